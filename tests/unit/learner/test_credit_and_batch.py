"""From rollouts to sequences, and from sequences to the tensors of a forward pass."""

import dataclasses

import pytest
import torch
from builders import rollout

from longshore.learner.batch import micro_batches
from longshore.learner.sequences import Credit, sequences_of
from longshore.learner.streams import streams_of
from longshore.types import FinishReason, GivenSpan, SampledSpan, Segment, Turn


def test_sequence_streams_line_up_with_tokens():
    (sequence,) = sequences_of(rollout(0, 0), Credit([0.5, -0.5], [0.0, 1.0], weight=2.0), 4, group=2)
    assert sequence.token_ids == [5, 6, 7, 1]
    assert sequence.sampled == [False, False, True, True]
    assert sequence.behaviour == [0.0, 0.0, -0.5, -0.25]
    assert sequence.temperature == [1.0] * 4
    assert sequence.versions == [-1, -1, 0, 0]
    assert sequence.turns == [-1, -1, 0, 0]
    assert sequence.advantages == [0.0, 0.0, 0.5, -0.5]
    assert sequence.weights == [0.0, 0.0, 2.0, 2.0]
    assert sequence.rewards == [0.0, 0.0, 0.0, 1.0]
    assert (sequence.rollout, sequence.group) == (4, 2)


@pytest.mark.parametrize("credit", [Credit([0.5] * 3), Credit([0.5] * 2, [1.0])])
def test_what_is_credited_must_be_as_much_as_was_sampled(credit):
    with pytest.raises(ValueError, match="for 2 sampled tokens"):
        sequences_of(rollout(0, 0), credit)


def two_segments():
    """Prompt 5 6, reply 7 1; then a segment that goes on behind 5 6 7 with 9 given and two replies of a token each."""
    base = rollout(0, 0)
    spans = (GivenSpan(1), SampledSpan(3, (-1.0,)), GivenSpan(2), SampledSpan(4, (-2.0,)))
    child = Segment("1", (9, 8, 5, 5, 3), spans, parent_segment_id="0", prefix_len=3)
    turns = (*base.turns, Turn("1", 1, 1, FinishReason.STOP), Turn("1", 4, 1, FinishReason.STOP))
    return dataclasses.replace(base, segments=(*base.segments, child), turns=turns)


def test_a_segment_that_extends_another_carries_the_prefix_without_loss():
    first, second = sequences_of(two_segments(), Credit([0.1, 0.2, 0.3, 0.4]))
    assert first.token_ids == [5, 6, 7, 1]
    assert first.advantages == [0.0, 0.0, 0.1, 0.2]
    assert second.token_ids == [5, 6, 7, 9, 8, 5, 5, 3]
    assert second.sampled == [False] * 4 + [True] + [False] * 2 + [True]
    assert second.behaviour == [0.0] * 4 + [-1.0, 0.0, 0.0, -2.0]
    assert second.versions == [-1] * 4 + [3, -1, -1, 4]
    assert second.turns == [-1] * 4 + [1, -1, -1, 2]
    assert second.advantages == [0.0] * 4 + [0.3, 0.0, 0.0, 0.4]


def test_micro_batch_points_at_the_position_before_each_sampled_token():
    (micro,) = micro_batches(sequences_of(rollout(0, 0), Credit([0.5, 0.25], [0.0, 1.0]), 3, 1), max_tokens=100)
    # The last token is predicted, and predicts nothing.
    assert micro.tree.token_ids.tolist() == [5, 6, 7]
    assert micro.places.tolist() == [1, 2]
    assert micro.targets.tolist() == [7, 1]
    streams = micro.streams
    assert streams.behaviour.tolist() == [-0.5, -0.25]
    assert streams.temperature.tolist() == [1.0, 1.0]
    assert streams.versions.tolist() == [0, 0]
    assert streams.advantages.tolist() == [0.5, 0.25]
    assert streams.weights.tolist() == [1.0, 1.0]
    assert streams.rewards.tolist() == [0.0, 1.0]
    assert streams.groups.tolist() == [1, 1]
    assert (streams.sequences.tolist(), streams.rollouts.tolist(), streams.turns.tolist()) == ([0, 0], [3, 3], [0, 0])


def test_streams_number_the_sequences_and_leave_a_first_token_out():
    bare = rollout(0, 0, prompt=(9,))
    first = dataclasses.replace(bare, segments=(Segment("0", (7, 1), (SampledSpan(2, (-0.5, -0.25)),)),), turns=())
    sequences = [*sequences_of(first, Credit([1.0, 2.0])), *sequences_of(two_segments(), Credit([3.0] * 4), 1)]
    streams = streams_of([(2, sequences[2]), (0, sequences[0]), (1, sequences[1])])
    assert streams.sequences.tolist() == [2, 2, 0, 1, 1]
    assert streams.rollouts.tolist() == [1, 1, 0, 1, 1]
    assert streams.turns.tolist() == [1, 2, -1, 0, 0]
    assert streams.behaviour.tolist() == [-1.0, -2.0, -0.25, -0.5, -0.25]
    assert streams.advantages.tolist() == [3.0, 3.0, 2.0, 3.0, 3.0]
    assert streams_of([]).behaviour.numel() == 0


def test_micro_batches_hold_every_token_once_within_the_budget():
    lengths = (2, 9, 4, 7, 30, 3)
    sequences = [
        sequence
        for length in lengths
        for sequence in sequences_of(
            rollout(0, 0, reply=tuple(range(length)), logprobs=(-0.1,) * length), Credit([float(length)] * length)
        )
    ]
    batches = list(micro_batches(sequences, max_tokens=24))
    assert sum(batch.targets.numel() for batch in batches) == sum(sum(item.sampled) for item in sequences)
    for batch in batches:
        assert batch.tree.size <= 24 or len(batch.tree.members) == 1
        assert [lengths[number] for number in batch.streams.sequences.tolist()] == batch.streams.advantages.tolist()
    assert sorted(torch.cat([batch.streams.advantages for batch in batches]).unique().tolist()) == [2, 3, 4, 7, 9, 30]
