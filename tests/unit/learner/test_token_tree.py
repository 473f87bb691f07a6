"""The layout of a pack: every token stands where it may see exactly its own sequence's tokens before it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.learner import token_tree
from longshore.learner.token_tree import MIN_SHARED, plant


def seen_from(tree, place):
    """The places that a place attends to."""
    ends = tree.subtree_ends(tree.size)
    return [other for other in range(tree.size) if other <= place < ends[other]]


def assert_sound(sequences, trees, budget):
    members = []
    for tree in trees:
        assert tree.size <= budget or len(tree.members) == 1
        covered = [place for node in tree.nodes for place in range(node.start, node.stop)]
        assert sorted(covered) == list(range(tree.size))
        for member, places in zip(tree.members, tree.places, strict=True):
            members.append(member)
            assert tree.token_ids[places].tolist() == sequences[member]
            assert tree.positions[places].tolist() == list(range(len(sequences[member])))
            assert seen_from(tree, places[-1]) == places.tolist()
    assert sorted(members) == list(range(len(sequences)))


@st.composite
def families(draw):
    """Sequences many of which begin like one before them."""
    sequences = []
    for _ in range(draw(st.integers(1, 8))):
        parent = draw(st.sampled_from(sequences)) if sequences and draw(st.booleans()) else []
        kept = parent[: draw(st.integers(0, len(parent)))]
        sequences.append(kept + draw(st.lists(st.integers(0, 2), min_size=0 if kept else 1, max_size=40)))
    return sequences


@settings(deadline=None, max_examples=300)
@given(families(), st.sampled_from([10, 40, 1000]), st.sampled_from([1, 4, MIN_SHARED]))
def test_every_token_sees_its_own_sequence_and_nothing_else(sequences, budget, shortest):
    before, token_tree.MIN_SHARED = token_tree.MIN_SHARED, shortest
    try:
        assert_sound(sequences, plant(sequences, budget), budget)
    finally:
        token_tree.MIN_SHARED = before


def test_a_common_beginning_stands_once():
    prompt = list(range(30))
    sequences = [[*prompt, 50, 51], [*prompt, 40], [*prompt, 50, 52, *range(70, 90)], [7]]
    (tree,) = plant(sequences, 1000)
    # The prompt once; the 50 of two completions is too short to be shared, and stands twice.
    assert tree.size == 30 + 2 + 1 + 22 + 1
    assert_sound(sequences, [tree], 1000)


def test_equal_sequences_cost_nothing():
    sequences = [[1, 2, 3]] * 5
    (tree,) = plant(sequences, 1000)
    assert tree.size == 3
    assert tree.members == (0, 1, 2, 3, 4)


def test_a_group_too_large_for_a_pack_is_cut_and_its_prompt_repeated():
    prompt = list(range(40))
    sequences = [[*prompt, *[100 + number] * 20] for number in range(6)]
    trees = plant(sequences, 100)
    assert [tree.size for tree in trees] == [100, 100]
    assert_sound(sequences, trees, 100)


def test_what_room_is_left_goes_to_those_that_begin_alike():
    prompt = list(range(40))
    # In the order of their tokens: 30, 60 and 20 tokens behind the prompt, then a stranger.
    sequences = [[*prompt, *[100] * 30], [*prompt, *[101] * 60], [*prompt, *[102] * 20], [200] * 5]
    trees = plant(sequences, 100)
    assert [(tree.members, tree.size) for tree in trees] == [((0, 2), 90), ((1,), 100), ((3,), 5)]
    assert_sound(sequences, trees, 100)


def test_a_sequence_longer_than_the_budget_goes_alone():
    sequences = [[1] * 50, [2] * 5, [3] * 5]
    trees = plant(sequences, 10)
    assert [tree.size for tree in trees] == [50, 10]


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        plant([[1], []], 10)
    assert plant([], 10) == []
