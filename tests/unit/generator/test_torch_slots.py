"""What concerns the slot engine's own loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_rig import ENGINES, WAIT_S, PausedAtFirstEvent, Rig, assert_matches, carried_logprobs
from tiny_llama import CONTEXT, config_json, reference_logprobs, tiny_model
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from longshore.errors import ConfigError
from longshore.generator import scheduler as scheduler_module
from longshore.generator.attention.cache import page_bytes
from longshore.generator.engine import Emit, Engine, TokensDrawn
from longshore.generator.llama_config import read_config
from longshore.generator.metrics import EngineMetrics
from longshore.generator.paged_decoder import DecodeStep
from longshore.generator.pages import PAGE
from longshore.generator.torch_slots import SlotOptions, TorchSlotsEngine
from longshore.types import JobRef, KvMark


def test_a_version_is_not_let_go_while_a_request_for_it_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the very step that ends the last request which it was held for."""
    old, new = tiny_model(0), tiny_model(9)
    rig = Rig(ENGINES["torch-slots"], old, residents=2)
    rig.serve(old, 1)
    decoder = rig.engine._decoder  # type: ignore[attr-defined]
    rig.submit("first", tokens=40, version=(1, 1))
    with PausedAtFirstEvent(rig, "first"):
        rig.stage(new, 2)
        swapped = rig.engine.swap()
        decode, left = decoder.decode, [40 - 32]

        def last_step() -> DecodeStep:
            left[0] -= 1
            if left[0] == 0:
                rig.submit("second", tokens=4, version=(1, 1))
            step: DecodeStep = decode()
            return step

        monkeypatch.setattr(decoder, "decode", last_step)
    swapped.result(WAIT_S)
    first, second = rig.wait("first", "second")
    assert {event.version for event in first.events} == {1}
    assert second.failure is None, second.failure
    assert_matches(second, old, (3, 4, 5, 6))
    rig.until(lambda: rig.engine.status().beside == ())
    rig.engine.close()


def narrow(pages: int, recompute: bool = False) -> Callable[..., Engine]:
    """Makes an engine with so many pages."""

    def make(model: LlamaForCausalLM, emit: Emit, slots: int, max_waiting: int, residents: int) -> Engine:
        shape = read_config(config_json(model))
        options = SlotOptions(slots, max_waiting, pages * page_bytes(shape), 1, residents, recompute=recompute)
        return TorchSlotsEngine(shape, options, emit, EngineMetrics(JobRef("default", "unit")))

    return make


def parked(rig: Rig) -> float:
    assert isinstance(rig.engine, TorchSlotsEngine)
    return float(rig.engine._metrics.parked._value.get())


def test_more_than_the_pages_hold_is_answered_all_the_same() -> None:
    """Six requests that would need 24 pages, of 7 that there are."""
    model = tiny_model(0)
    rig = Rig(narrow(7), model, slots=6)
    rig.serve(model, 1)
    before = parked(rig)
    prompts = [(number, 1, 2, 3) for number in range(5)] + [(7,) * 30]
    for number, prompt in enumerate(prompts):
        rig.submit(str(number), prompt, tokens=CONTEXT)
    for number, outcome in enumerate(rig.wait(*map(str, range(6)))):
        assert len(outcome.tokens) == CONTEXT - len(prompts[number])
        assert {event.kv for event in outcome.events} == {KvMark.RECOMPUTED}
        assert_matches(outcome, model, prompts[number])
    assert parked(rig) > before
    assert rig.engine.status().kv_used_ratio == 0
    rig.engine.close()


def test_a_parked_request_can_be_aborted_and_may_be_late() -> None:
    model = tiny_model(0)
    rig = Rig(narrow(5), model, slots=3)
    paused = PausedAtFirstEvent(rig, "0")
    # They are admitted together, once there is a version.
    for number in range(3):
        rig.submit(str(number), (number, 5), tokens=CONTEXT)
    rig.serve(model, 1)
    with paused:
        # By its first 32 tokens another one has been parked: three of 34 tokens need nine pages. That is pressure.
        assert bool(rig.engine._parked)  # type: ignore[attr-defined]
        status = rig.engine.status()
        assert (status.running + status.waiting, status.waiting >= 1) == (3, True)
        rig.engine.abort("2")
    for outcome, number in zip(rig.wait("0", "1"), range(2), strict=True):
        assert_matches(outcome, model, (number, 5))
    rig.until(lambda: rig.engine.status().running == 0)
    assert rig.engine.status().kv_used_ratio == 0
    rig.engine.close()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_swap_while_some_are_parked(recompute: bool) -> None:
    """Who is parked is computed by the new weights alone, whatever becomes of the others' caches."""
    old, new = tiny_model(0), tiny_model(9)
    rig = Rig(narrow(6, recompute), old, slots=3)
    rig.serve(old, 1)
    names = {str(number): (number, 5) for number in range(3)}
    for name, prompt in names.items():
        rig.submit(name, prompt, tokens=CONTEXT)
    with PausedAtFirstEvent(rig, "0"):
        rig.stage(new, 2)
        swapped = rig.engine.swap()
    swapped.result(WAIT_S)
    for name, outcome in zip(names, rig.wait(*names), strict=True):
        drawn = sum(len(event.token_ids) for event in outcome.events if event.version == 1)
        kinds = {(event.version, event.kv) for event in outcome.events}
        assert 0 < drawn < len(outcome.tokens)
        if (2, KvMark.CARRIED) in kinds and len(kinds) == 2:
            expected = carried_logprobs(old, new, names[name], outcome.tokens, drawn)
            assert_close(outcome.logprobs, expected, atol=1e-4, rtol=0)
        assert not (recompute and (2, KvMark.CARRIED) in kinds)
        for event, start in _with_starts(outcome.events):
            if event.kv is KvMark.RECOMPUTED:
                model = old if event.version == 1 else new
                prompt = (*names[name], *outcome.tokens[:start])
                piece = torch.tensor(event.logprobs)
                assert_close(piece, reference_logprobs(model, prompt, event.token_ids), atol=1e-4, rtol=0)
    rig.engine.close()


def test_a_long_recomputation_lets_others_draw_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 40)
    old, new = tiny_model(0), tiny_model(9)
    rig = Rig(narrow(100, recompute=True), old, slots=4)
    rig.serve(old, 1)
    for number in range(4):
        rig.submit(str(number), (number, 5), tokens=CONTEXT)
    engine, parked_at_steps = rig.engine, []
    assert isinstance(engine, TorchSlotsEngine)
    decode = engine._decoder.decode

    def step() -> DecodeStep:
        parked_at_steps.append(len(engine._parked))
        return decode()

    with PausedAtFirstEvent(rig, "0"):
        monkeypatch.setattr(engine._decoder, "decode", step)
        rig.stage(new, 2)
        swapped = rig.engine.swap()
    swapped.result(WAIT_S)
    for outcome in rig.wait(*map(str, range(4))):
        assert len(outcome.tokens) == CONTEXT - 2
    # Four of 34 tokens, 40 at a time.
    assert parked_at_steps[:5] == [3, 2, 1, 0, 0]
    rig.engine.close()


def test_the_cache_bounds_the_context_and_must_not_be_too_small() -> None:
    model = tiny_model(0)
    engine = Rig(narrow(3), model).engine
    assert engine.limits.context == 3 * PAGE
    engine.close()
    with pytest.raises(ConfigError, match="room for 0 tokens: raise LONGSHORE_CACHE_MB"):
        Rig(narrow(0), model)


def _with_starts(events: list[TokensDrawn]) -> list[tuple[TokensDrawn, int]]:
    """Each event with the number of tokens before it."""
    starts = [sum(len(event.token_ids) for event in events[:number]) for number in range(len(events))]
    return list(zip(events, starts, strict=True))
