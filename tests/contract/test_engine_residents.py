"""What every engine must do with several versions in memory, run against each of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from engine_rig import (
    LONG,
    PROMPT,
    SEVERAL,
    SLOTS,
    WAIT_S,
    PausedAtFirstEvent,
    Rig,
    assert_matches,
    each,
    proof_of,
    takes_requests,
)
from tiny_llama import named_tensors, tiny_model
from transformers import LlamaForCausalLM

from longshore.errors import Unavailable
from longshore.generator.engine import Engine, Failure
from longshore.types import KvMark

Models = dict[int, LlamaForCausalLM]


@pytest.fixture(scope="module")
def models() -> Models:
    """Versions 1, 2 and 3."""
    return {version: tiny_model(seed=10 * version) for version in (1, 2, 3)}


@pytest.fixture(params=each(SEVERAL))
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    # An engine that sleeps must be woken by what happens, not by its clock.
    monkeypatch.setattr("longshore.generator.torch_slots.IDLE_S", 3600.0)
    return SEVERAL[request.param]


@pytest.fixture
def rig(make: Callable[..., Engine], models: Models) -> Iterator[Rig]:
    """Room for two versions, of which version 1 is served."""
    rig = Rig(make, models[1], residents=2)
    rig.serve(models[1], 1)
    yield rig
    rig.engine.close()
    assert rig.engine.ended.exception(WAIT_S) is None


def beside(rig: Rig) -> tuple[int, ...]:
    return rig.engine.status().beside


def test_pinned_requests_go_on_across_swaps_with_their_versions_logprobs(rig: Rig, models: Models) -> None:
    rig.submit("pinned", (1, 2), tokens=LONG, version=(1, 1))
    rig.submit("free", (2, 1), tokens=LONG)
    with PausedAtFirstEvent(rig, "pinned"):
        rig.stage(models[2], 2)
        swapped = rig.engine.swap()
    # Nothing holds it.
    swapped.result(WAIT_S)
    assert beside(rig) == (1,)
    fresh = rig.reply("fresh", (1, 2), tokens=8)
    late = rig.reply("late", (1, 2), tokens=8, version=(1, 1))
    pinned, free = rig.wait("pinned", "free")
    assert {(event.version, event.kv) for event in pinned.events} == {(1, KvMark.RECOMPUTED)}
    assert_matches(pinned, models[1], (1, 2))
    assert [event.version for event in free.events][-1] == 2
    assert {(event.version, event.kv) for event in fresh.events} == {(2, KvMark.RECOMPUTED)}
    assert_matches(fresh, models[2], (1, 2))
    assert {(event.version, event.kv) for event in late.events} == {(1, KvMark.RECOMPUTED)}
    assert_matches(late, models[1], (1, 2))
    # Kept for those requests alone.
    rig.until(lambda: beside(rig) == ())


def test_a_pinned_request_outlives_several_swaps(rig: Rig, models: Models) -> None:
    rig.submit("pinned", (1, 2), tokens=LONG, version=(1, 1))
    with PausedAtFirstEvent(rig, "pinned"):
        rig.stage(models[2], 2)
        first = rig.engine.swap()
        # Comes after the first in the engine's inbox only if it is called when the first is done.
        seconds: list[object] = []

        def again(_: object) -> None:
            rig.stage(models[3], 3)
            seconds.append(rig.engine.swap())

        first.add_done_callback(again)
    rig.until(lambda: rig.engine.status().version == 3)
    (pinned,) = rig.wait("pinned")
    assert {event.version for event in pinned.events} == {1}
    assert_matches(pinned, models[1], (1, 2))
    assert_matches(rig.reply("after"), models[3], PROMPT)


def test_a_batch_of_two_versions_gives_each_its_own_logprobs(rig: Rig, models: Models) -> None:
    """Also where they share a prompt, and with more requests than slots, so that slots change hands."""
    rig.keep(models[2], 2)
    assert beside(rig) == (2,)
    prompts = [(3, 4, 5, 6), (3, 4, 5, 6), (7,), (9, 8, 7)]
    names = []
    for number in range(12):
        version = 1 + number % 2
        name = f"{number} under {version}"
        rig.submit(name, prompts[number % 4], tokens=5 + number % 3, version=(version, version), temperature=1.3)
        names.append((name, prompts[number % 4], version))
        if number == SLOTS + 7:
            break
    for name, prompt, version in names:
        (outcome,) = rig.wait(name)
        assert outcome.failure is None, outcome.failure
        assert {(event.version, event.kv) for event in outcome.events} == {(version, KvMark.RECOMPUTED)}
        assert_matches(outcome, models[version], prompt, 1.3)
    # Kept for requests to come, whoever has ended.
    assert beside(rig) == (2,)


def test_a_full_batch_of_the_other_version_alone(rig: Rig, models: Models) -> None:
    rig.keep(models[2], 2)
    for number in range(SLOTS):
        rig.submit(str(number), (number + 1, 3), tokens=10, version=(2, 2))
    for number, outcome in enumerate(rig.wait(*map(str, range(SLOTS)))):
        assert_matches(outcome, models[2], (number + 1, 3))


def test_a_prompt_computed_by_one_version_is_not_copied_for_the_other(rig: Rig, models: Models) -> None:
    rig.keep(models[2], 2)
    for number, version in enumerate((1, 2, 1, 2, 2, 1)):
        outcome = rig.reply(str(number), PROMPT, tokens=6, version=(version, version))
        assert_matches(outcome, models[version], PROMPT)
    # Nor when the other one has taken the place in which it was computed, and holds it.
    rig.submit("other", PROMPT, tokens=LONG, version=(2, 2))
    with PausedAtFirstEvent(rig, "other"):
        rig.submit("again", PROMPT, tokens=6, version=(1, 1))
    other, again = rig.wait("other", "again")
    assert_matches(other, models[2], PROMPT)
    assert_matches(again, models[1], PROMPT)


def test_a_slot_is_as_good_as_new_after_another_versions_request(rig: Rig, models: Models) -> None:
    rig.keep(models[2], 2)
    for number in range(2 * SLOTS):
        rig.submit(str(number), PROMPT, tokens=3 + number, version=(2, 2))
    rig.engine.abort("1")
    rig.wait("0", "2", "3")
    rig.serve(models[3], 3)
    rig.wait(*(str(number) for number in range(4, 2 * SLOTS)))
    for number in range(SLOTS):
        rig.submit(f"after {number}", PROMPT, tokens=6)
    for outcome in rig.wait(*(f"after {number}" for number in range(SLOTS))):
        assert {event.version for event in outcome.events} == {3}
        assert_matches(outcome, models[3], PROMPT)


def test_a_kept_version_that_becomes_the_served_one(rig: Rig, models: Models) -> None:
    rig.keep(models[2], 2)
    rig.submit("early", (1, 2), tokens=LONG, version=(2, 2))
    rig.submit("old", (1, 2), tokens=LONG, version=(1, 1))
    with PausedAtFirstEvent(rig, "early"):
        rig.stage(models[2], 2)
        swapped = rig.engine.swap()
    swapped.result(WAIT_S)
    assert beside(rig) == (1,)
    early, old = rig.wait("early", "old")
    assert {(event.version, event.kv) for event in early.events} == {(2, KvMark.RECOMPUTED)}
    assert_matches(early, models[2], (1, 2))
    assert_matches(old, models[1], (1, 2))
    rig.until(lambda: beside(rig) == ())


def test_keeping_the_served_version_changes_nothing(rig: Rig, models: Models) -> None:
    rig.keep(models[1], 1)
    assert beside(rig) == ()
    assert_matches(rig.reply("r"), models[1], PROMPT)


def test_another_version_takes_the_place_of_one_that_nobody_uses(rig: Rig, models: Models) -> None:
    rig.keep(models[2], 2)
    rig.keep(models[3], 3)
    assert beside(rig) == (3,)
    outcome = rig.reply("three", version=(3, 3))
    assert_matches(outcome, models[3], PROMPT)
    rig.submit("two", version=(2, 2), seconds=0.05)
    failure = rig.wait("two")[0].failure
    assert failure is not None
    # Above the served version it might have been still to come.
    assert failure.failure is Failure.DEADLINE


def test_a_version_in_use_is_not_pushed_out(rig: Rig, models: Models) -> None:
    rig.keep(models[2], 2)
    rig.submit("two", (1, 2), tokens=LONG, version=(2, 2))
    with PausedAtFirstEvent(rig, "two"):
        rig.stage(models[3], 3)
        kept = rig.engine.keep()
    with pytest.raises(Unavailable, match="no room for version 3"):
        kept.result(WAIT_S)
    (two,) = rig.wait("two")
    assert_matches(two, models[2], (1, 2))
    rig.keep(models[3], 3)
    assert beside(rig) == (3,)


def test_a_kept_version_that_nobody_uses_does_not_hold_a_swap(rig: Rig, models: Models) -> None:
    rig.keep(models[2], 2)
    rig.submit("pinned", (1, 2), tokens=LONG, version=(1, 1))
    with PausedAtFirstEvent(rig, "pinned"):
        rig.stage(models[3], 3)
        swapped = rig.engine.swap()
    swapped.result(WAIT_S)
    assert beside(rig) == (1,)
    (pinned,) = rig.wait("pinned")
    assert_matches(pinned, models[1], (1, 2))


def test_without_room_a_pinned_request_holds_the_swap(rig: Rig, models: Models) -> None:
    rig.keep(models[2], 2)
    rig.submit("two", (1, 2), tokens=LONG, version=(2, 2))
    rig.submit("one", (1, 2), tokens=LONG, version=(1, 1))
    with PausedAtFirstEvent(rig, "two"):
        rig.stage(models[3], 3)
        swapped = rig.engine.swap()
    one, two = rig.wait("one", "two")
    swapped.result(WAIT_S)
    assert_matches(one, models[1], (1, 2))
    assert_matches(two, models[2], (1, 2))
    assert rig.engine.status().version == 3


def test_closing_fails_a_version_that_is_being_kept(rig: Rig, models: Models) -> None:
    rig.submit("r", (1,), tokens=LONG)
    with PausedAtFirstEvent(rig, "r"):
        rig.stage(models[2], 2)
        kept = rig.engine.keep()
        closer = threading.Thread(target=rig.engine.close)
        closer.start()
        rig.until(lambda: not takes_requests(rig))
    closer.join(WAIT_S)
    with pytest.raises(Unavailable):
        kept.result(WAIT_S)
    rig.stage(models[2], 2)
    with pytest.raises(Unavailable):
        rig.engine.keep()


def test_matrices_of_what_did_not_change_are_one_in_memory(make: Callable[..., Engine], models: Models) -> None:
    """As far as an engine reuses them, a version beside costs what changed; and what changed shows."""
    rig = Rig(make, models[1], residents=2)
    tensors = named_tensors(models[1])
    rig.engine.stage(1, tensors, proof_of(models[1]))
    rig.engine.swap().result(WAIT_S)
    name = "model.layers.1.mlp.up_proj.weight"
    changed = {**tensors, name: named_tensors(models[2])[name]}
    mixed = tiny_model(seed=10)
    mixed.load_state_dict({**mixed.state_dict(), name: changed[name]})
    rig.engine.stage(2, changed, proof_of(mixed))
    rig.engine.keep().result(WAIT_S)
    assert_matches(rig.reply("new", version=(2, 2)), mixed, PROMPT)
    assert_matches(rig.reply("old", version=(1, 1)), models[1], PROMPT)
    rig.engine.close()
