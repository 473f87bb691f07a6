"""What vLLM's engine does with new weights beyond the contract that every engine keeps (tests/contract)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import torch
import vllm_rig
from engine_rig import LONG, PROMPT, SLOTS, WAIT_S, PausedAtFirstEvent, Rig, assert_matches, proof_of
from tiny_llama import CONTEXT, config_json, named_tensors, reference_logprobs, tiny_model
from transformers import LlamaForCausalLM

from longshore.errors import IntegrityError, Rejected, Unavailable
from longshore.generator.engine import Emit, Engine, Failure
from longshore.generator.metrics import UNPROVEN
from longshore.generator.vllm_engine.engine import VllmEngine
from longshore.types import KvMark

pytestmark = pytest.mark.vllm
# Tokens of a reply that is still being drawn when an update comes.
WHILE = 100
# Longer than one block of vLLM's cache: shorter prefixes are not shared.
PREFIX = tuple(1 + number % 30 for number in range(CONTEXT - 60))


@pytest.fixture(scope="module")
def old() -> LlamaForCausalLM:
    return tiny_model(seed=0)


@pytest.fixture(scope="module")
def new() -> LlamaForCausalLM:
    return tiny_model(seed=9)


@pytest.fixture
def start(old: LlamaForCausalLM) -> Iterator[Callable[..., Rig]]:
    """Makes a rig that serves version 1."""
    rigs = []

    def make(**policy: bool) -> Rig:
        def maker(model: LlamaForCausalLM, emit: Emit, slots: int, max_waiting: int, residents: int) -> Engine:
            return vllm_rig.make(config_json(model), emit, slots, max_waiting, **policy)

        rigs.append(Rig(maker, old, SLOTS))
        rigs[-1].serve(old, 1)
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.engine.close()
        assert rig.engine.ended.exception(WAIT_S) is None


def engine_of(rig: Rig) -> VllmEngine:
    assert isinstance(rig.engine, VllmEngine)
    return rig.engine


def unproven() -> float:
    return UNPROVEN.labels("default", "contract")._value.get()


def leave_tied_weights(rig: Rig, leave: bool) -> None:
    host = engine_of(rig)._host
    call = host.process._engine.collective_rpc("leave_tied_weights", args=(leave,))
    asyncio.run_coroutine_threadsafe(call, host.loop).result(WAIT_S)


def test_the_canary_catches_tied_weights_that_vllm_left_stale(
    start: Callable[..., Rig], old: LlamaForCausalLM, new: LlamaForCausalLM
) -> None:
    rig, before = start(), unproven()
    assert old.config.tie_word_embeddings
    leave_tied_weights(rig, True)
    try:
        with pytest.raises(IntegrityError, match="a canary's log-probs are off by"):
            rig.serve(new, 2)
    finally:
        leave_tied_weights(rig, False)
    assert unproven() == before + 1
    assert rig.engine.status().version == 1
    assert_matches(rig.reply("after the refusal"), old, PROMPT)
    rig.serve(new, 2)
    assert_matches(rig.reply("with the fix"), new, PROMPT)


def test_no_token_that_refused_weights_drew_is_ever_told(
    start: Callable[..., Rig], old: LlamaForCausalLM, new: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = start()
    engine = engine_of(rig)
    held: list[int] = []
    prove = engine._loads.prove

    async def slowly(version: object) -> None:
        """Proves only once every request has drawn with what is loaded."""
        while version is not engine._resident and not all(run.held for run in engine._runs.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        held.append(sum(len(run.held) for run in engine._runs.values()))
        await prove(version)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._loads, "prove", slowly)
    prompts = {"a": (1, 2), "b": (3,), "c": PROMPT}
    for name, prompt in prompts.items():
        rig.submit(name, prompt, tokens=WHILE)
    with PausedAtFirstEvent(rig, "a"):
        rig.engine.stage(2, named_tensors(new), proof_of(new, off_by=0.5))
        swapped = rig.engine.swap()
    with pytest.raises(IntegrityError):
        swapped.result(WAIT_S)
    assert held[0] >= 3
    for name, prompt in prompts.items():
        (outcome,) = rig.wait(name)
        assert {(event.version, event.kv) for event in outcome.events} == {(1, KvMark.RECOMPUTED)}
        assert len(outcome.tokens) == WHILE
        assert_matches(outcome, old, prompt)


def test_tensors_that_vllm_cannot_load_leave_the_old_version(
    start: Callable[..., Rig], old: LlamaForCausalLM, new: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = start()
    rig.submit("running", (1, 2), tokens=LONG)
    tensors = named_tensors(new)
    tensors["model.layers.0.nobody.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    # As for a first version, of which nothing is known.
    monkeypatch.setattr("longshore.generator.vllm_engine.engine.check_like", lambda *_: None)
    rig.engine.stage(2, tensors, proof_of(new))
    with pytest.raises(IntegrityError, match="vLLM could not load"):
        rig.engine.swap().result(WAIT_S)
    assert_matches(rig.wait("running")[0], old, (1, 2))
    rig.serve(new, 2)
    assert_matches(rig.reply("after"), new, PROMPT)


def test_a_cache_that_is_computed_anew_gives_the_new_versions_logprobs(
    start: Callable[..., Rig], old: LlamaForCausalLM, new: LlamaForCausalLM
) -> None:
    rig = start(recompute=True)
    rig.submit("r", (1, 2), tokens=WHILE)
    with PausedAtFirstEvent(rig, "r"):
        rig.stage(new, 2)
        swapped = rig.engine.swap()
    swapped.result(WAIT_S)
    (outcome,) = rig.wait("r")
    assert {(event.kv, event.kv_min_version) for event in outcome.events} == {(KvMark.RECOMPUTED, None)}
    count = sum(len(event.token_ids) for event in outcome.events if event.version == 1)
    assert 0 < count < len(outcome.tokens)
    for model, part in ((old, slice(0, count)), (new, slice(count, None))):
        expected = reference_logprobs(model, (1, 2), outcome.tokens)[part]
        torch.testing.assert_close(outcome.logprobs[part], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_shared_prefixes_are_of_one_load_of_weights(
    start: Callable[..., Rig], old: LlamaForCausalLM, new: LlamaForCausalLM, recompute: bool
) -> None:
    rig = start(recompute=recompute)
    for number, (version, model) in enumerate([(1, old), (2, new), (1, old)]):
        if number:
            rig.serve(model, version)
        for again in range(2):
            assert_matches(rig.reply(f"{number} {again}", PREFIX, tokens=4), model, PREFIX)


def test_a_drain_ends_what_runs_under_the_version_that_it_began_with(
    start: Callable[..., Rig], old: LlamaForCausalLM, new: LlamaForCausalLM
) -> None:
    rig = start(drain=True)
    rig.submit("running", (1, 2), tokens=WHILE)
    with PausedAtFirstEvent(rig, "running"):
        rig.stage(new, 2)
        swapped = rig.engine.swap()
        rig.submit("next", tokens=4)
    swapped.result(WAIT_S)
    running, following = rig.wait("running", "next")
    assert {event.version for event in running.events} == {1}
    assert_matches(running, old, (1, 2))
    assert {event.version for event in following.events} == {2}
    assert_matches(following, new, PROMPT)


def test_only_what_changed_is_sent(start: Callable[..., Rig], old: LlamaForCausalLM, new: LlamaForCausalLM) -> None:
    rig = start()
    tensors = named_tensors(old)
    rig.engine.stage(2, tensors, proof_of(old))
    rig.engine.swap().result(WAIT_S)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {**tensors, name: named_tensors(new)[name]}
    mixed = tiny_model(seed=0)
    mixed.load_state_dict({**mixed.state_dict(), name: tensors[name]})
    rig.engine.stage(3, tensors, proof_of(mixed))
    staged = engine_of(rig)._staged
    assert staged is not None
    assert staged.segment.size < 0.4 * sum(tensor.nbytes for tensor in tensors.values())
    rig.engine.swap().result(WAIT_S)
    assert_matches(rig.reply("r"), mixed, PROMPT)


def test_a_version_staged_before_another_was_swapped_in_is_loaded_whole(
    start: Callable[..., Rig], old: LlamaForCausalLM, new: LlamaForCausalLM
) -> None:
    rig = start()
    third = tiny_model(seed=5)
    rig.stage(new, 2)
    swapped = rig.engine.swap()
    rig.stage(third, 3)
    swapped.result(WAIT_S)
    rig.engine.swap().result(WAIT_S)
    assert_matches(rig.reply("r"), third, PROMPT)


def test_a_second_version_beside_has_no_room(start: Callable[..., Rig], new: LlamaForCausalLM) -> None:
    rig = start()
    rig.stage(new, 2)
    with pytest.raises(Unavailable, match="one version at a time"):
        rig.engine.keep()
    assert rig.reply("r").events[0].version == 1


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_temperatures_that_vllm_would_change_are_refused(start: Callable[..., Rig], temperature: float) -> None:
    rig = start()
    with pytest.raises(Rejected, match="with engine vllm"):
        rig.submit("r", temperature=temperature)
    assert len(rig.reply("good").tokens) == 6


def test_a_request_that_vllm_itself_refuses_ends_alone(
    start: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = start()
    # Our own check comes first: it has to be led astray.
    monkeypatch.setattr("longshore.generator.vllm_engine.engine.MAX_TEMPERATURE", 10.0)
    rig.submit("foreign", temperature=5.0)
    failure = rig.wait("foreign")[0].failure
    assert failure is not None
    assert failure.failure is Failure.REFUSED
    assert len(rig.reply("good").tokens) == 6
