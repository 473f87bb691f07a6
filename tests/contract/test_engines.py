"""What every engine must do, run against each of them (tests/support/engine_rig.py)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import pytest
import torch
from engine_rig import (
    ENGINES,
    LONG,
    PROMPT,
    SLOTS,
    WAIT_S,
    PausedAtFirstEvent,
    Rig,
    assert_matches,
    carried_logprobs,
    each,
    proof_of,
    takes_requests,
)
from tiny_llama import CONTEXT, VOCABULARY, named_tensors, tiny_model
from transformers import LlamaForCausalLM

from longshore.errors import IntegrityError, Rejected, Unavailable
from longshore.generator.canary import Proof
from longshore.generator.engine import (
    Engine,
    EngineEvent,
    Failure,
    QueueFull,
)
from longshore.types import FinishReason, KvMark
from longshore.weights.client import CanaryProbe


@pytest.fixture(scope="module")
def old() -> LlamaForCausalLM:
    return tiny_model(seed=0)


@pytest.fixture(scope="module")
def new() -> LlamaForCausalLM:
    return tiny_model(seed=9)


@pytest.fixture(params=each(ENGINES))
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    # An engine that sleeps must be woken by what happens, not by its clock.
    monkeypatch.setattr("longshore.generator.torch_slots.IDLE_S", 3600.0)
    return ENGINES[request.param]


@pytest.fixture
def rig(make: Callable[..., Engine], old: LlamaForCausalLM) -> Iterator[Rig]:
    """Four slots, eight waiting places, version 1 served."""
    rig = Rig(make, old, SLOTS, max_waiting=8)
    rig.serve(old, 1)
    yield rig
    rig.engine.close()
    assert rig.engine.ended.done()
    assert rig.engine.ended.exception() is None


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_logprobs_are_those_of_the_distribution_that_was_drawn_from(
    rig: Rig, old: LlamaForCausalLM, temperature: float
) -> None:
    outcome = rig.reply("r", tokens=20, temperature=temperature)
    assert len(outcome.tokens) == 20
    assert_matches(outcome, old, PROMPT, temperature)
    assert {(event.version, event.kv, event.kv_min_version) for event in outcome.events} == {
        (1, KvMark.RECOMPUTED, None)
    }


def test_draws_follow_the_distribution(make: Callable[..., Engine], old: LlamaForCausalLM) -> None:
    rig = Rig(make, old, slots=256, max_waiting=4096)
    rig.serve(old, 1)
    names = [str(number) for number in range(3000)]
    for name in names:
        rig.submit(name, tokens=1, temperature=2.0)
    drawn = torch.tensor([outcome.tokens[0] for outcome in rig.wait(*names)])
    rig.engine.close()
    with torch.no_grad():
        expected = torch.softmax(old(torch.tensor([PROMPT])).logits[0, -1] / 2.0, -1)
    seen = torch.bincount(drawn, minlength=VOCABULARY) / len(names)
    # Five standard deviations of the most uncertain cell.
    assert float((seen - expected).abs().max()) < 5 * 0.5 / len(names) ** 0.5


def test_many_more_requests_than_slots_all_finish(make: Callable[..., Engine], old: LlamaForCausalLM) -> None:
    rig = Rig(make, old, SLOTS, max_waiting=100)
    rig.serve(old, 1)
    random = torch.Generator().manual_seed(3)
    prompts = [
        tuple(torch.randint(0, VOCABULARY, (1 + number % 9,), generator=random).tolist()) for number in range(50)
    ]
    for number in range(50):
        # Neighbours share a prompt, as the members of a group do.
        rig.submit(
            str(number), prompts[number - number % 2], tokens=1 + number % 7, temperature=0.5 + 0.7 * (number % 3)
        )
    outcomes = rig.wait(*map(str, range(50)))
    for number, outcome in enumerate(outcomes):
        assert len(outcome.tokens) == 1 + number % 7
        assert_matches(outcome, old, prompts[number - number % 2], 0.5 + 0.7 * (number % 3))
    assert (rig.engine.status().running, rig.engine.status().waiting) == (0, 0)
    rig.engine.close()


def test_a_stop_token_ends_the_reply_and_is_part_of_it(rig: Rig) -> None:
    stop = tuple(range(0, VOCABULARY, 3))
    outcome = rig.reply("r", tokens=50, stop=stop)
    assert outcome.finish is FinishReason.STOP
    assert outcome.tokens[-1] in stop
    assert not set(outcome.tokens[:-1]) & set(stop)


def test_length_ends_the_reply(rig: Rig) -> None:
    outcome = rig.reply("r", tokens=5)
    assert (outcome.finish, len(outcome.tokens)) == (FinishReason.LENGTH, 5)


def test_the_end_of_the_context_ends_the_reply(rig: Rig, old: LlamaForCausalLM) -> None:
    prompt = [7] * (CONTEXT - 3)
    outcome = rig.reply("r", prompt, tokens=50)
    assert (outcome.finish, len(outcome.tokens)) == (FinishReason.LENGTH, 3)
    assert_matches(outcome, old, prompt)


def test_a_short_reply_is_one_event(rig: Rig) -> None:
    assert len(rig.reply("r", tokens=3).events) == 1


def test_a_long_reply_comes_in_parts(rig: Rig) -> None:
    outcome = rig.reply("r", (1,), tokens=LONG)
    assert len(outcome.events) > 1
    assert [event.finish for event in outcome.events[:-1]] == [None] * (len(outcome.events) - 1)


def test_abort_frees_the_slot_and_silences_the_request(rig: Rig) -> None:
    for number in range(SLOTS):
        rig.submit(f"long-{number}", (1,), tokens=LONG)
    rig.submit("waiting")
    with PausedAtFirstEvent(rig, "long-0"):
        rig.submit("queued")
        rig.engine.abort("queued")
        for number in range(SLOTS):
            rig.engine.abort(f"long-{number}")
        rig.engine.abort("never heard of")
    rig.wait("waiting")
    rig.reply("after")
    assert "queued" not in rig.outcomes
    assert not any(rig.outcomes[f"long-{number}"].ended for number in range(SLOTS) if f"long-{number}" in rig.outcomes)
    rig.until(lambda: rig.engine.status().running == 0)


def test_an_aborted_id_can_be_used_again(rig: Rig) -> None:
    rig.submit("r", tokens=LONG)
    rig.engine.abort("r")
    rig.until(lambda: rig.engine.status().running == 0)
    rig.outcomes.pop("r", None)
    rig.until(lambda: _accepted(rig, "r"))


def _accepted(rig: Rig, name: str) -> bool:
    try:
        rig.submit(name, tokens=1)
    except ValueError:
        return False
    return True


def test_an_id_in_use_is_refused(rig: Rig) -> None:
    rig.submit("r", version=(2, None))
    with pytest.raises(ValueError):
        rig.submit("r")


def test_a_swap_under_a_request_gives_one_span_a_version(
    rig: Rig, old: LlamaForCausalLM, new: LlamaForCausalLM
) -> None:
    # An engine that remembers prompts must forget them at the swap, though their requests run on.
    rig.submit("before", tokens=LONG)
    rig.submit("r", (1, 2), tokens=LONG)
    with PausedAtFirstEvent(rig, "r"):
        rig.stage(new, 2)
        swapped = rig.engine.swap()
    swapped.result(WAIT_S)
    fresh = rig.reply("fresh", tokens=10)
    (outcome,) = rig.wait("r")

    before = [event for event in outcome.events if event.version == 1]
    after = outcome.events[len(before) :]
    assert before
    assert after
    assert {(event.version, event.kv, event.kv_min_version) for event in before} == {(1, KvMark.RECOMPUTED, None)}
    assert {(event.version, event.kv, event.kv_min_version) for event in after} == {(2, KvMark.CARRIED, 1)}
    assert len(outcome.tokens) == CONTEXT - 2

    drawn_before = sum(len(event.token_ids) for event in before)
    expected = carried_logprobs(old, new, (1, 2), outcome.tokens, drawn_before)
    torch.testing.assert_close(outcome.logprobs, expected, atol=1e-4, rtol=0)
    # Whoever comes after the swap sees nothing of the old weights.
    assert {(event.version, event.kv) for event in fresh.events} == {(2, KvMark.RECOMPUTED)}
    assert_matches(fresh, new, PROMPT)


def test_two_swaps_under_a_request_keep_the_oldest_version(rig: Rig, new: LlamaForCausalLM) -> None:
    third: queue.Queue[Future[None]] = queue.Queue()

    def swap_again(_: object) -> None:
        rig.stage(new, 3)
        third.put(rig.engine.swap())

    rig.submit("r", (1, 2), tokens=LONG)
    with PausedAtFirstEvent(rig, "r"):
        rig.stage(new, 2)
        # Called on the engine's thread: the second swap comes one decode step after the first.
        rig.engine.swap().add_done_callback(swap_again)
    third.get(timeout=WAIT_S).result(WAIT_S)
    (outcome,) = rig.wait("r")
    marks = [(event.version, event.kv_min_version) for event in outcome.events]
    assert list(dict.fromkeys(marks)) == [(1, None), (2, 1), (3, 1)]


@pytest.mark.parametrize("off_by", [0.01, -0.01, float("nan")])
def test_a_version_whose_canary_is_off_is_not_served(
    rig: Rig, old: LlamaForCausalLM, new: LlamaForCausalLM, off_by: float
) -> None:
    rig.submit("running", (1, 2), tokens=LONG)
    with pytest.raises(IntegrityError, match="canary"):
        refused(rig, named_tensors(new), proof_of(new, off_by))
    (running,) = rig.wait("running")
    assert_matches(running, old, (1, 2))
    outcome = rig.reply("r")
    assert {event.version for event in (*running.events, *outcome.events)} == {1}
    assert_matches(outcome, old, PROMPT)
    rig.serve(new, 2)
    assert_matches(rig.reply("after"), new, PROMPT)


def test_weights_that_are_not_the_canarys_are_not_served(
    rig: Rig, old: LlamaForCausalLM, new: LlamaForCausalLM
) -> None:
    with pytest.raises(IntegrityError, match="canary"):
        refused(rig, named_tensors(old), proof_of(new))
    assert_matches(rig.reply("r"), old, PROMPT)


@pytest.mark.parametrize(
    "proof", [Proof(()), Proof((CanaryProbe((1,), ()),)), Proof((CanaryProbe((1, VOCABULARY), (-1.0,)),))]
)
def test_what_cannot_be_proven_is_not_served(rig: Rig, old: LlamaForCausalLM, proof: Proof) -> None:
    with pytest.raises(IntegrityError):
        refused(rig, named_tensors(old), proof)
    assert rig.reply("r").events[0].version == 1


def refused(rig: Rig, tensors: dict[str, torch.Tensor], proof: Proof) -> None:
    """Stages and swaps; an engine proves at the one or at the other."""
    rig.engine.stage(2, tensors, proof)
    rig.engine.swap().result(WAIT_S)


def test_tensors_of_another_model_are_refused_and_the_old_version_serves_on(rig: Rig, new: LlamaForCausalLM) -> None:
    tensors = named_tensors(new)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(IntegrityError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        refused(rig, tensors, proof_of(new))
    assert rig.reply("r").events[0].version == 1


def test_a_pinned_request_holds_the_swap_until_it_ends(rig: Rig, old: LlamaForCausalLM, new: LlamaForCausalLM) -> None:
    rig.submit("pinned", (1, 2), tokens=LONG, version=(1, 1))
    with PausedAtFirstEvent(rig, "pinned"):
        rig.stage(new, 2)
        swapped = rig.engine.swap()
        rig.submit("late", version=(1, 1))
        rig.submit("free", tokens=2)
    pinned, late, free = rig.wait("pinned", "late", "free")
    swapped.result(WAIT_S)
    assert {event.version for event in pinned.events} == {1}
    assert_matches(pinned, old, (1, 2))
    # Otherwise pinned requests without end could hold the swap for ever.
    assert late.failure is not None
    assert late.failure.failure is Failure.VERSION
    # Requests that any version may answer go on meanwhile.
    assert free.events[0].version == 1
    assert rig.engine.status().version == 2


def test_a_waiting_pinned_request_holds_the_swap_too(rig: Rig, new: LlamaForCausalLM) -> None:
    for number in range(SLOTS):
        rig.submit(f"long-{number}", (1,), tokens=LONG)
    rig.submit("pinned", version=(None, 1))
    with PausedAtFirstEvent(rig, "long-0"):
        rig.stage(new, 2)
        swapped = rig.engine.swap()
    assert {event.version for event in rig.wait("pinned")[0].events} == {1}
    swapped.result(WAIT_S)


def test_the_hold_ends_at_the_pinned_requests_deadline(rig: Rig, new: LlamaForCausalLM) -> None:
    for number in range(SLOTS):
        rig.submit(f"long-{number}", (1,), tokens=LONG)
    with PausedAtFirstEvent(rig, "long-0"):
        rig.submit("pinned", version=(1, 1), seconds=0.0)
        rig.stage(new, 2)
        swapped = rig.engine.swap()
    swapped.result(WAIT_S)
    failure = rig.wait("pinned")[0].failure
    assert failure is not None
    assert failure.failure is Failure.DEADLINE


def test_a_version_that_is_gone_fails_the_request(rig: Rig, new: LlamaForCausalLM) -> None:
    rig.serve(new, 2)
    failure = rig.reply("r", version=(1, 1)).failure
    assert failure is not None
    assert failure.failure is Failure.VERSION


def test_a_request_for_a_newer_version_waits_for_it_and_lets_others_pass(rig: Rig, new: LlamaForCausalLM) -> None:
    rig.submit("newer", version=(2, None))
    assert rig.reply("any").events[0].version == 1
    assert "newer" not in rig.outcomes
    rig.serve(new, 2)
    (outcome,) = rig.wait("newer")
    assert {event.version for event in outcome.events} == {2}
    assert_matches(outcome, new, PROMPT)


def test_a_version_that_is_skipped_fails_who_waits_for_it(rig: Rig, new: LlamaForCausalLM) -> None:
    rig.submit("skipped", version=(2, 2))
    rig.until(lambda: rig.engine.status().waiting == 1)
    rig.serve(new, 3)
    failure = rig.wait("skipped")[0].failure
    assert failure is not None
    assert failure.failure is Failure.VERSION


def test_a_wait_ends_at_the_deadline(rig: Rig) -> None:
    failure = rig.reply("r", version=(2, None), seconds=0.05).failure
    assert failure is not None
    assert failure.failure is Failure.DEADLINE
    assert rig.engine.status().waiting == 0


def test_the_queue_is_bounded(rig: Rig) -> None:
    for number in range(SLOTS + 8):
        rig.submit(f"waiting-{number}", version=(2, None))
    with pytest.raises(QueueFull):
        rig.submit("one more")
    rig.engine.abort("waiting-0")
    rig.until(lambda: rig.engine.status().waiting == SLOTS + 7)
    assert len(rig.reply("there is room").tokens) == 6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": ()}, "prompt"),
        ({"prompt": (1, VOCABULARY)}, "prompt"),
        ({"prompt": (1, -1)}, "prompt"),
        ({"prompt": (1,) * CONTEXT}, "prompt"),
        ({"temperature": 0.0}, "sampling"),
        ({"temperature": -1.0}, "sampling"),
        ({"temperature": float("nan")}, "sampling"),
        ({"temperature": float("inf")}, "sampling"),
        ({"temperature": 1e-300}, "sampling"),
        ({"tokens": 0}, "sampling"),
        ({"version": (3, 2)}, "version"),
    ],
)
def test_bad_requests_are_refused_and_the_engine_goes_on(rig: Rig, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        rig.submit("bad", **changes)  # type: ignore[arg-type]
    assert caught.value.reason == reason
    assert len(rig.reply("good").tokens) == 6


def test_the_longest_prompt_that_fits_is_answered_with_one_token(rig: Rig) -> None:
    assert len(rig.reply("r", (1,) * (CONTEXT - 1)).tokens) == 1


def test_status_counts(rig: Rig) -> None:
    for number in range(SLOTS + 2):
        rig.submit(f"long-{number}", (1,), tokens=LONG)
    with PausedAtFirstEvent(rig, "long-0"):
        status = rig.engine.status()
    assert (status.version, status.running, status.waiting) == (1, SLOTS, 2)
    assert 0 < status.kv_used_ratio < 1


def test_a_closed_engine_takes_nothing_and_fails_a_swap_that_waits(rig: Rig, new: LlamaForCausalLM) -> None:
    rig.submit("pinned", (1,), tokens=LONG, version=(1, 1))
    with PausedAtFirstEvent(rig, "pinned"):
        rig.stage(new, 2)
        swapped = rig.engine.swap()
        # Tells the thread to end; joining it has to wait until it is let go.
        closer = threading.Thread(target=rig.engine.close)
        closer.start()
        rig.until(lambda: not takes_requests(rig))
    closer.join(WAIT_S)
    with pytest.raises(Unavailable):
        swapped.result(WAIT_S)


def test_an_error_in_the_thread_ends_the_engine_for_all_to_see(
    make: Callable[..., Engine], old: LlamaForCausalLM
) -> None:
    rig = Rig(make, old, SLOTS, max_waiting=8)
    rig.serve(old, 1)

    def fail(events: Sequence[EngineEvent]) -> None:
        raise RuntimeError("the callback failed")

    rig.on_events = fail
    rig.submit("r")
    with pytest.raises(RuntimeError, match="the callback failed"):
        rig.engine.ended.result(WAIT_S)
    with pytest.raises(Unavailable):
        rig.submit("after")


def test_the_fingerprint_names_engine_version_and_dtype(rig: Rig) -> None:
    fingerprint = rig.engine.fingerprint
    assert all((fingerprint.engine, fingerprint.engine_version, fingerprint.dtype, fingerprint.config_digest))
