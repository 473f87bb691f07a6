"""Which prompts are computed and which are copied."""

from __future__ import annotations

import random

from longshore.generator.prompt_index import Context, PromptIndex

A, B = (1, 2), (3,)


def test_equal_contexts_are_computed_once() -> None:
    assert PromptIndex().plan([0, 1, 2, 3], [A, B, A, A]) == ({0: A, 1: B}, {2: 0, 3: 0})


def test_a_later_call_copies_from_the_slot_filled_last() -> None:
    index = PromptIndex()
    index.plan([0, 1], [A, A])
    assert index.plan([2], [A]) == ({}, {2: 1})


def test_a_slot_that_is_filled_anew_is_no_source() -> None:
    index = PromptIndex()
    index.plan([0], [A])
    assert index.plan([0, 1], [B, A]) == ({0: B, 1: A}, {})
    assert index.plan([0, 1], [A, B]) == ({0: A, 1: B}, {})


def test_empty_contexts_need_nothing() -> None:
    assert PromptIndex().plan([0, 1], [(), ()]) == ({}, {})


def test_nothing_is_copied_after_clear() -> None:
    index = PromptIndex()
    index.plan([0], [A])
    index.clear()
    assert index.plan([1], [A]) == ({1: A}, {})


def test_every_copy_comes_from_a_slot_that_holds_the_context() -> None:
    rng = random.Random(0)
    index = PromptIndex()
    held: dict[int, Context] = {}
    copies = 0
    for _ in range(2000):
        slots = rng.sample(range(8), rng.randint(1, 4))
        contexts = [tuple(range(rng.randint(0, 4))) for _ in slots]
        computed, copied = index.plan(slots, contexts)
        for slot in slots:
            held.pop(slot, None)
        held |= computed
        for slot, source in copied.items():
            assert source not in copied
            held[slot] = held[source]
        copies += len(copied)
        wanted = dict(zip(slots, contexts, strict=True))
        assert all(held.get(slot, ()) == context for slot, context in wanted.items())
    assert copies > 1000
