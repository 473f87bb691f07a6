"""What every engine must do with running requests at a swap when it is to compute their caches anew, or to drain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from engine_rig import ENGINES, LONG, PROMPT, SLOTS, WAIT_S, PausedAtFirstEvent, Rig, Update, assert_matches, each
from tiny_llama import CONTEXT, reference_logprobs, tiny_model
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from longshore.generator.engine import Engine, Failure
from longshore.types import KvMark


@pytest.fixture(scope="module")
def old() -> LlamaForCausalLM:
    return tiny_model(seed=0)


@pytest.fixture(scope="module")
def new() -> LlamaForCausalLM:
    return tiny_model(seed=9)


@pytest.fixture(params=each(ENGINES))
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    monkeypatch.setattr("longshore.generator.torch_slots.IDLE_S", 3600.0)
    return ENGINES[request.param]


@pytest.fixture
def recomputing(make: Callable[..., Engine], old: LlamaForCausalLM) -> Iterator[Rig]:
    yield from _served(partial(make, update=Update(recompute=True)), old)


@pytest.fixture
def draining(make: Callable[..., Engine], old: LlamaForCausalLM) -> Iterator[Rig]:
    yield from _served(partial(make, update=Update(drain=True)), old)


def _served(make: Callable[..., Engine], old: LlamaForCausalLM) -> Iterator[Rig]:
    rig = Rig(make, old, SLOTS, max_waiting=8)
    rig.serve(old, 1)
    yield rig
    rig.engine.close()
    assert rig.engine.ended.exception(WAIT_S) is None


def test_caches_that_are_computed_anew_are_the_new_versions_alone(
    recomputing: Rig, old: LlamaForCausalLM, new: LlamaForCausalLM
) -> None:
    rig = recomputing
    # A group and a stranger: what the group shares is computed anew too.
    names = {"r": (1, 2), "group 1": PROMPT * 5, "group 2": PROMPT * 5}
    for name, prompt in names.items():
        rig.submit(name, prompt, tokens=LONG)
    with PausedAtFirstEvent(rig, "r"):
        rig.stage(new, 2)
        swapped = rig.engine.swap()
    swapped.result(WAIT_S)
    fresh = rig.reply("fresh", PROMPT * 5, tokens=8)
    for name, outcome in zip(names, rig.wait(*names), strict=True):
        assert {event.kv for event in outcome.events} == {KvMark.RECOMPUTED}
        assert [event.version for event in outcome.events] == sorted(event.version for event in outcome.events)
        assert len(outcome.tokens) == CONTEXT - len(names[name])
        drawn = sum(len(event.token_ids) for event in outcome.events if event.version == 1)
        assert 0 < drawn < len(outcome.tokens)
        # Every token as the version that drew it sees all that came before.
        for model, part in ((old, slice(0, drawn)), (new, slice(drawn, None))):
            expected = reference_logprobs(model, names[name], outcome.tokens)
            assert_close(outcome.logprobs[part], expected[part], atol=1e-4, rtol=0)
    assert_matches(fresh, new, PROMPT * 5)


def test_a_drained_swap_waits_for_running_requests_and_others_wait_for_it(
    draining: Rig, old: LlamaForCausalLM, new: LlamaForCausalLM
) -> None:
    rig = draining
    rig.submit("r", (1, 2), tokens=LONG)
    with PausedAtFirstEvent(rig, "r"):
        rig.stage(new, 2)
        swapped = rig.engine.swap()
        rig.submit("later", tokens=4)
        rig.submit("pinned", version=(1, 1))
    running, later, pinned = rig.wait("r", "later", "pinned")
    swapped.result(WAIT_S)
    assert {(event.version, event.kv) for event in running.events} == {(1, KvMark.RECOMPUTED)}
    assert_matches(running, old, (1, 2))
    assert {(event.version, event.kv) for event in later.events} == {(2, KvMark.RECOMPUTED)}
    assert_matches(later, new, PROMPT)
    # Nobody may make the swap wait longer.
    assert pinned.failure is not None
    assert pinned.failure.failure is Failure.VERSION


def test_a_drained_swap_waits_no_longer_than_the_deadlines(draining: Rig, new: LlamaForCausalLM) -> None:
    rig = draining
    rig.submit("r", (1,), tokens=LONG)
    rig.submit("abandoned", (1, 2), tokens=LONG)
    with PausedAtFirstEvent(rig, "r"):
        rig.submit("late", (1,), tokens=LONG, seconds=0.0)
        rig.stage(new, 2)
        swapped = rig.engine.swap()
        rig.engine.abort("r")
        rig.engine.abort("abandoned")
    swapped.result(WAIT_S)
    assert rig.engine.status().version == 2
    assert rig.wait("late")[0].failure is not None
