"""Admission, version constraints and deadlines, without an engine."""

from __future__ import annotations

import pytest

from longshore.errors import Unavailable
from longshore.generator import scheduler as scheduler_module
from longshore.generator.engine import EngineRequest, Failure, RequestFailed
from longshore.generator.scheduler import Scheduler
from longshore.types import FinishReason, KvMark, Sampling, VersionConstraint

Bounds = tuple[int | None, int | None]


def request(name: str, version: Bounds = (None, None), *, deadline: float = 100.0, prompt: int = 3) -> EngineRequest:
    return EngineRequest(name, (1,) * prompt, Sampling(1.0, 4), deadline, VersionConstraint(*version))


def scheduler(slots: int = 2, version: int | None = 5, residents: int = 1) -> Scheduler:
    made = Scheduler(slots, context=16, residents=residents)
    made.version = version
    return made


def admitted(made: Scheduler) -> list[str]:
    return [reply.request.request_id for reply in made.admit()]


def test_admits_in_order_and_no_more_than_there_are_slots() -> None:
    made = scheduler()
    for name in "abc":
        assert made.add(request(name)) is None
    assert admitted(made) == ["a", "b"]
    assert admitted(made) == []
    assert (made.num_running, made.num_waiting) == (2, 1)
    assert made.drop("a") is not None
    assert admitted(made) == ["c"]


def test_running_requests_have_slots_of_their_own() -> None:
    made = scheduler(slots=3)
    for name in "abc":
        made.add(request(name))
    assert sorted(reply.slot for reply in made.admit()) == [0, 1, 2]
    freed = made.drop("b")
    made.add(request("d"))
    assert [reply.slot for reply in made.admit()] == [freed]


def test_nobody_is_admitted_before_the_first_version() -> None:
    made = scheduler(version=None)
    made.add(request("a", (0, 0)))
    assert admitted(made) == []


def test_who_waits_for_a_version_lets_others_pass() -> None:
    made = scheduler()
    made.add(request("newer", (6, None)))
    made.add(request("any"))
    assert admitted(made) == ["any"]
    made.next_version = 6
    made.swapped()
    assert admitted(made) == ["newer"]


def test_long_prompts_are_spread_over_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 10)
    made = scheduler(slots=9)
    for name, prompt in (("a", 15), ("b", 6), ("c", 4), ("d", 1)):
        made.add(request(name, prompt=prompt))
    assert [admitted(made), admitted(made), admitted(made)] == [["a"], ["b", "c"], ["d"]]


@pytest.mark.parametrize(
    ("bounds", "held"),
    [((5, 5), True), ((None, 5), True), ((4, 6), True), ((5, None), False), ((None, None), False), ((6, 6), False)],
)
def test_who_holds_a_swap_to_version_7(bounds: Bounds, held: bool) -> None:
    made = scheduler()
    made.add(request("a", bounds))
    made.next_version = 7
    assert made.swap_is_held is held
    made.admit()
    assert made.swap_is_held is held


def test_a_rollback_is_held_by_who_asks_for_more() -> None:
    made = scheduler()
    made.add(request("a", (5, None)))
    made.next_version = 4
    assert made.swap_is_held
    made.drop("a")
    assert not made.swap_is_held


def test_while_a_swap_waits_nobody_else_can_hold_it() -> None:
    made = scheduler()
    made.next_version = 6
    failure = made.add(request("pinned", (5, 5)))
    assert isinstance(failure, RequestFailed)
    assert failure.failure is Failure.VERSION
    assert made.add(request("free")) is None
    assert made.add(request("next", (6, 6))) is None


def test_an_outdated_request_fails_at_once_or_at_the_swap() -> None:
    made = scheduler()
    failure = made.add(request("old", (None, 4)))
    assert failure is not None
    assert failure.failure is Failure.VERSION
    assert "4" in failure.message
    made.add(request("skipped", (6, 6)))
    made.next_version = 7
    _, failures, _ = made.swapped()
    assert [(item.request_id, item.failure) for item in failures] == [("skipped", Failure.VERSION)]
    assert made.num_waiting == 0


def test_a_swap_ends_the_spans_of_running_requests() -> None:
    made = scheduler()
    made.add(request("drew"))
    made.add(request("not yet"))
    slots = {reply.request.request_id: reply.slot for reply in made.admit()}
    assert made.drawn(slots["drew"], 9, -0.5, now=0.0) is None
    made.next_version = 6
    events, _, _ = made.swapped()
    assert [(item.request_id, item.token_ids, item.version, item.kv) for item in events] == [
        ("drew", (9,), 5, KvMark.RECOMPUTED)
    ]
    for _ in range(2):
        assert made.drawn(slots["drew"], 8, -0.25, now=0.0) is None
    event = made.drawn(slots["drew"], 7, -0.25, now=0.0)
    assert event is not None
    assert (event.token_ids, event.version, event.kv, event.kv_min_version, event.finish) == (
        (8, 8, 7),
        6,
        KvMark.CARRIED,
        5,
        FinishReason.LENGTH,
    )
    assert made.num_running == 1


def test_a_rollback_under_a_request_counts_as_the_oldest_version_in_its_cache() -> None:
    made = scheduler()
    made.add(request("a"))
    (reply,) = made.admit()
    made.next_version = 4
    made.swapped()
    made.next_version = 6
    made.swapped()
    for _ in range(3):
        made.drawn(reply.slot, 1, -1.0, now=0.0)
    event = made.drawn(reply.slot, 1, -1.0, now=0.0)
    assert event is not None
    assert (event.version, event.kv_min_version) == (6, 4)


def test_deadlines_end_running_and_waiting_requests() -> None:
    made = scheduler(slots=1)
    made.add(request("running", deadline=10.0))
    made.add(request("waiting", deadline=10.0))
    made.add(request("patient", deadline=20.0))
    (reply,) = made.admit()
    assert made.expire(9.0) == ([], [])
    failures, slots = made.expire(10.0)
    assert sorted(item.request_id for item in failures) == ["running", "waiting"]
    assert {item.failure for item in failures} == {Failure.DEADLINE}
    assert slots == [reply.slot]
    assert admitted(made) == ["patient"]


def pinned(version: int) -> Bounds:
    return version, version


def swap(made: Scheduler, version: int) -> tuple[list[str], list[str], list[int]]:
    """To a version, when nothing holds it; names of events and failures, and the slots that stay."""
    made.next_version = version
    assert not made.swap_is_held
    events, failures, staying = made.swapped()
    return [event.request_id for event in events], [failure.request_id for failure in failures], staying


def test_a_pinned_request_stays_with_its_version_beside_the_new_one() -> None:
    made = scheduler(residents=2)
    made.add(request("pinned", pinned(5)))
    made.add(request("free"))
    slots = {reply.request.request_id: reply.slot for reply in made.admit()}
    for slot in slots.values():
        made.drawn(slot, 1, -0.5, now=0.0)
    assert swap(made, 6) == (["free"], [], [slots["pinned"]])
    assert (made.version, made.beside) == (6, (5,))
    for _ in range(3):
        events = [made.drawn(slot, 2, -0.5, now=0.0) for slot in (slots["pinned"], slots["free"])]
    assert [(event.request_id, event.version, event.kv) for event in events if event] == [
        ("pinned", 5, KvMark.RECOMPUTED),
        ("free", 6, KvMark.CARRIED),
    ]
    # It was held for that request alone.
    assert made.forget_unused() == [5]
    assert made.beside == ()


def test_a_request_that_waits_for_a_version_beside_is_admitted_under_it() -> None:
    made = scheduler(slots=1, residents=2)
    made.add(request("running", pinned(5)))
    made.add(request("waiting", pinned(5)))
    (first,) = made.admit()
    assert swap(made, 6) == ([], [], [first.slot])
    assert made.forget_unused() == []
    made.drop("running")
    assert made.forget_unused() == []
    (second,) = made.admit()
    assert (second.request.request_id, second.version) == ("waiting", 5)
    # A newcomer too, as long as the version is here; afterwards it is gone for good.
    assert made.add(request("late", pinned(5))) is None
    made.drop("waiting")
    made.drop("late")
    assert made.forget_unused() == [5]
    failure = made.add(request("too late", pinned(5)))
    assert failure is not None
    assert failure.failure is Failure.VERSION


def test_who_accepts_both_is_answered_by_the_served_version() -> None:
    made = scheduler(residents=2)
    assert made.keep(4) is None
    made.add(request("any", (4, None)))
    made.add(request("older", (None, 4)))
    assert {reply.request.request_id: reply.version for reply in made.admit()} == {"any": 5, "older": 4}


def test_a_kept_version_stays_until_its_place_is_needed() -> None:
    made = scheduler(residents=3)
    assert (made.keep(3), made.keep(4), made.keep(5)) == (None, None, None)
    assert made.beside == (3, 4)
    assert made.forget_unused() == []
    made.add(request("uses 3", pinned(3)))
    # The oldest that nobody uses goes, not the oldest.
    assert made.keep(2) == 4
    assert made.beside == (3, 2)
    made.add(request("uses 2", pinned(2)))
    with pytest.raises(Unavailable, match="no room for version 1 beside the 3"):
        made.keep(1)
    assert made.beside == (3, 2)
    made.drop("uses 3")
    assert made.keep(1) == 3


def test_a_version_that_is_kept_again_outlives_its_last_request() -> None:
    made = scheduler(residents=2)
    made.add(request("pinned", pinned(5)))
    made.admit()
    swap(made, 6)
    assert made.keep(5) is None
    made.drop("pinned")
    assert made.forget_unused() == []
    assert made.beside == (5,)


def test_with_a_place_beside_a_pinned_request_is_taken_while_a_swap_is_near() -> None:
    """A swap and the request may come in one turn of the engine's loop, in either order."""
    made = scheduler(slots=1, residents=2)
    made.next_version = 6
    assert made.add(request("pinned", (5, 5))) is None
    assert swap(made, 6) == ([], [], [])
    assert made.beside == (5,)
    assert [(reply.request.request_id, reply.version) for reply in made.admit()] == [("pinned", 5)]
    # The place is taken now: the next swap does without those that would hold it.
    made.next_version = 7
    assert made.add(request("late", (6, 6))) is not None


def test_without_a_place_a_pinned_request_holds_the_swap() -> None:
    made = scheduler(residents=2)
    made.keep(4)
    made.add(request("uses 4", pinned(4)))
    made.add(request("uses 5", pinned(5)))
    made.admit()
    made.next_version = 6
    assert made.swap_is_held
    # Nor is another one taken that would hold it longer.
    assert made.add(request("late", pinned(5))) is not None
    made.drop("uses 4")
    assert not made.swap_is_held


def test_a_version_that_nobody_uses_makes_room_for_one_that_is_in_use() -> None:
    made = scheduler(residents=2)
    made.keep(4)
    made.add(request("uses 5", pinned(5)))
    (reply,) = made.admit()
    assert swap(made, 6) == ([], [], [reply.slot])
    assert made.beside == (5,)


def test_going_back_to_a_version_that_is_beside_needs_no_place_more() -> None:
    made = scheduler(residents=2)
    made.keep(4)
    made.add(request("uses 4", pinned(4)))
    made.add(request("uses 5", pinned(5)))
    slots = {reply.request.request_id: reply.slot for reply in made.admit()}
    assert swap(made, 4) == ([], [], [slots["uses 5"]])
    assert (made.version, made.beside) == (4, (5,))
    made.drop("uses 5")
    assert made.forget_unused() == [5]


def test_a_swap_that_nobody_objects_to_keeps_nothing() -> None:
    made = scheduler(residents=2)
    made.add(request("free"))
    made.admit()
    swap(made, 6)
    assert made.beside == ()


def test_a_skipped_version_beside_still_answers() -> None:
    made = scheduler(residents=3)
    made.keep(7)
    made.add(request("seven", pinned(7)))
    assert [reply.version for reply in made.admit()] == [7]
    assert swap(made, 9) == ([], [], [])
    made.add(request("again", pinned(7)))
    assert [reply.version for reply in made.admit()] == [7]


def test_a_drain_lets_what_runs_end_and_admits_nobody_meanwhile() -> None:
    made = Scheduler(4, context=16, drain=True)
    made.version = 5
    made.add(request("running"))
    assert admitted(made) == ["running"]
    made.next_version = 6
    assert made.swap_is_held
    made.add(request("any"))
    assert admitted(made) == []
    made.drop("running")
    assert not made.swap_is_held
    made.swapped()
    assert [(reply.request.request_id, reply.version) for reply in made.admit()] == [("any", 6)]


def test_a_drain_still_answers_who_needs_the_served_version() -> None:
    made = Scheduler(4, context=16, drain=True)
    made.version = 5
    made.add(request("pinned", (5, 5)))
    made.add(request("any"))
    made.next_version = 6
    assert made.swap_is_held
    assert admitted(made) == ["pinned"]
    made.drop("pinned")
    assert not made.swap_is_held


def test_what_is_recomputed_is_not_marked_as_carried() -> None:
    made = Scheduler(1, context=16, recompute=True)
    made.version = 5
    made.add(request("a"))
    (reply,) = made.admit()
    made.drawn(reply.slot, 1, -0.5, 0.0)
    made.next_version = 6
    events, _, _ = made.swapped()
    assert [(event.version, event.kv, event.kv_min_version) for event in events] == [(5, KvMark.RECOMPUTED, None)]
    for token in (2, 3, 4):
        event = made.drawn(reply.slot, token, -0.5, 0.0)
    assert event is not None
    assert (event.version, event.kv, event.kv_min_version, event.token_ids) == (6, KvMark.RECOMPUTED, None, (2, 3, 4))
