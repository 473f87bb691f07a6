"""Replies over real gRPC from scripted generators: what goes on elsewhere, what is final, what is kept."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from generator_fleet import JOB, Generators
from scripted_peers import event

from longshore.actor import drawing, fleet, pace
from longshore.actor.addresses import AddressBook
from longshore.actor.balancing import Trouble
from longshore.actor.drawing import MAX_FAULTS
from longshore.actor.episode import AttemptFailed
from longshore.errors import ConfigError, Rejected, Unavailable
from longshore.proto.v1 import generator_pb2, rollout_pb2
from longshore.types import (
    EngineFingerprint,
    FinishReason,
    KvMark,
    Message,
    Purpose,
    SampledSpan,
    Sampling,
    Task,
    Ticket,
    TicketRef,
    VersionConstraint,
)

STOP, LENGTH, ABORTED = (
    rollout_pb2.FINISH_REASON_STOP,
    rollout_pb2.FINISH_REASON_LENGTH,
    rollout_pb2.FINISH_REASON_ABORTED,
)
TICKET = Ticket(
    TicketRef(JOB, 3, 1),
    4,
    Purpose.TRAIN,
    Task("t", (Message("user", "3+4="),), answer="7"),
    Sampling(0.7, 8, (1,)),
    learner_epoch=1,
    issued_at=1.0,
    version=VersionConstraint(2, 5),
)
GOOD = (event([7, 1], 3, finish=STOP),)
Code = grpc.StatusCode


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(drawing, "_LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(fleet, "_MEMBERSHIP_S", 0.05)
    monkeypatch.setattr(fleet, "_REPORT_S", 0.05)


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Generators]:
    made = Generators(tmp_path, 1)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Generators]:
    made = Generators(tmp_path, 2)
    await made.start()
    yield made
    await made.stop()


def asked(generators: Generators, number: int = 0) -> list[generator_pb2.ReplyRequest]:
    return generators.peers[number].generator.requests


def rest(request: generator_pb2.ReplyRequest) -> list[Any]:
    """Goes on after 7 with 8, and after both with the end."""
    left = [token for token in (7, 8, 1) if token not in request.token_ids]
    return [event(left, 4, finish=STOP)]


async def test_a_request_says_what_the_ticket_says(one: Generators) -> None:
    one.scripts(0, GOOD)
    await one.draw(TICKET)
    (request,) = asked(one)
    (job,) = one.peers[0].generator.jobs
    assert (job.project, job.job) == ("default", "j")
    assert list(request.token_ids) == [5, 6]
    assert (request.sampling.temperature, request.sampling.max_new_tokens) == (pytest.approx(0.7), 8)
    assert list(request.sampling.stop_token_ids) == [1]
    assert (request.version.min_version, request.version.max_version) == (2, 5)
    assert (request.prefix_key, request.request_id) == ("3", "3.1/2/4/0")


async def test_neighbours_of_one_version_are_one_span(one: Generators) -> None:
    carried = rollout_pb2.KV_MARK_CARRIED
    one.scripts(
        0,
        (
            event([7], 3),
            event([8, 9], 3, engine=False),
            event([10], 4, engine=False),
            event([11], 4, engine=False, kv=carried, oldest=3),
            event(finish=LENGTH, engine=False),
        ),
    )
    reply = await one.draw(TICKET)
    assert reply.token_ids == [7, 8, 9, 10, 11]
    assert reply.spans == [
        SampledSpan(3, (-0.5, -0.5, -0.5)),
        SampledSpan(4, (-0.5,)),
        SampledSpan(4, (-0.5,), kv=KvMark.CARRIED, kv_min_version=3),
    ]
    assert reply.finish is FinishReason.LENGTH
    assert reply.engines == (EngineFingerprint("scripted", "1", "float32", ""),)


@pytest.mark.parametrize(
    "broken",
    [
        (Code.UNAVAILABLE,),
        (Code.RESOURCE_EXHAUSTED,),
        (event([7], 3), Code.UNAVAILABLE),
        (event([7], 3), Code.CANCELLED),
        (event([7], 3), Code.INTERNAL),
        (event([7], 3),),
        (event([7], 3, finish=ABORTED),),
        # What may not become part of a rollout does not, and the rest comes from elsewhere.
        (event([7], 3), event([9], 9, engine=False)),
        (event([7], 3, engine=False),),
        (generator_pb2.ReplyEvent(token_ids=[7], engine=event().engine),),
        (event([9] * 9, 3),),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
async def test_what_breaks_off_goes_on_where_it_broke(tmp_path: Path, broken: tuple[object, ...], number: int) -> None:
    generators = Generators(tmp_path, number)
    await generators.start()
    try:
        for index in range(number):
            generators.scripts(index, broken, rest)  # type: ignore[arg-type]
        if number == 2:
            generators.scripts(1, rest)
            generators.balancer.sent(generators.peers[0].address, ["3.1"])
        reply = await generators.draw(TICKET)
    finally:
        await generators.stop()
    assert reply.token_ids == [7, 8, 1]
    first, second = asked(generators)[0], asked(generators, number - 1)[-1]
    kept = len(second.token_ids) - 2
    assert list(second.token_ids) == [5, 6, 7][: 2 + kept]
    assert second.sampling.max_new_tokens == 8 - kept
    assert [span.version for span in reply.spans] == ([3, 4] if kept else [4])
    assert (first.request_id, second.request_id) == ("3.1/2/4/0", "3.1/2/4/1")
    assert generators.retries == 1


async def test_one_that_drew_as_long_as_it_draws_for_anybody_goes_on(two: Generators) -> None:
    two.scripts(0, (event([7], 3), Code.DEADLINE_EXCEEDED), rest)
    two.balancer.sent(two.peers[0].address, ["3.1"])
    assert (await two.draw(TICKET)).token_ids == [7, 8, 1]
    assert [len(asked(two, number)) for number in range(2)] == [2, 0]


@pytest.mark.parametrize("broken", [(), (Code.UNAVAILABLE,), (Code.INTERNAL,)])
@pytest.mark.parametrize(("tokens", "finish"), [([7, 1], FinishReason.STOP), ([9] * 8, FinishReason.LENGTH)])
async def test_a_reply_that_lacks_only_its_end_has_ended(
    one: Generators, tokens: list[int], finish: FinishReason, broken: tuple[Code, ...]
) -> None:
    one.scripts(0, (event(tokens, 3), *broken), GOOD)
    reply = await one.draw(TICKET)
    assert (reply.token_ids, reply.finish) == (tokens, finish)
    assert len(asked(one)) == 1


async def test_each_span_says_which_engine_drew_it(two: Generators) -> None:
    other = event([8, 1], 3, finish=STOP)
    other.engine.dtype = "bfloat16"
    two.scripts(0, (event([7], 3), Code.UNAVAILABLE))
    two.scripts(1, (other,))
    two.balancer.sent(two.peers[0].address, ["3.1"])
    reply = await two.draw(TICKET)
    assert [span.engine_index for span in reply.spans] == [0, 1]
    assert [engine.dtype for engine in reply.engines] == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [(Code.INVALID_ARGUMENT, "prompt"), (Code.OUT_OF_RANGE, "prompt"), (Code.FAILED_PRECONDITION, "version")],
)
async def test_what_no_attempt_can_do_is_rejected(one: Generators, code: Code, reason: str) -> None:
    one.scripts(0, (code,))
    with pytest.raises(Rejected, match=f"{reason}: scripted {code.name}"):
        await one.draw(TICKET)
    assert len(asked(one)) == 1


async def test_another_generator_may_still_have_the_version(two: Generators) -> None:
    two.scripts(0, (Code.FAILED_PRECONDITION,))
    two.scripts(1, GOOD)
    two.balancer.sent(two.peers[0].address, ["3.1"])
    assert (await two.draw(TICKET)).token_ids == [7, 1]
    two.scripts(1, (Code.FAILED_PRECONDITION,))
    with pytest.raises(Rejected, match="version: scripted FAILED_PRECONDITION"):
        await two.draw(TICKET)


async def test_one_that_is_set_aside_may_still_have_the_version(two: Generators) -> None:
    refusing, paused = (peer.address for peer in two.peers)
    two.scripts(0, (Code.FAILED_PRECONDITION,))
    two.scripts(1, GOOD)
    two.balancer.sent(paused, ())
    two.dispatch.ended(paused, Trouble.AWAY)
    assert two.balancer.usable() == [refusing]
    assert (await two.draw(TICKET)).token_ids == [7, 1]


@pytest.mark.parametrize("code", [Code.ABORTED, Code.NOT_FOUND])
async def test_a_pinned_version_that_cannot_be_brought_is_held_against_nobody(one: Generators, code: Code) -> None:
    one.scripts(0, *[(code,)] * 3, GOOD)
    assert (await one.draw(TICKET)).token_ids == [7, 1]
    assert one.balancer.next_pause_end() is None
    assert len(asked(one)) == 4


async def test_generators_that_fail_on_a_request_are_not_asked_for_ever(two: Generators) -> None:
    for number in range(2):
        two.scripts(number, (Code.INTERNAL,))
    with pytest.raises(AttemptFailed, match=r"generator_failed: .*INTERNAL"):
        await two.draw(TICKET)
    assert len(asked(two, 0)) + len(asked(two, 1)) == MAX_FAULTS


async def test_an_answer_by_another_version_is_never_taken(one: Generators) -> None:
    one.scripts(0, (event([7, 1], 6, finish=STOP),))
    with pytest.raises(AttemptFailed, match=r"version 6 answered; 2\.\.5 was asked for"):
        await one.draw(TICKET)


async def test_generators_that_stay_away(tmp_path: Path) -> None:
    gone = Generators(tmp_path, 2, patience_s=0.5)
    await gone.start()
    for peer in gone.peers:
        await peer.stop()
    try:
        with pytest.raises(Unavailable, match=r"no generator has been serving for|away for"):
            await gone.draw(TICKET)
    finally:
        await gone.stop()


async def test_what_has_begun_waits_for_longer_than_patience(tmp_path: Path) -> None:
    away = Generators(tmp_path, 1, patience_s=0.2)
    await away.start()
    away.scripts(0, (event([7], 3), 30.0), rest)
    try:
        drawing_ = asyncio.create_task(away.draw(TICKET))
        async with asyncio.timeout(20):
            while not any(flight.progress._begun for flight in away.mover._flights):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await away.peers[0].stop()
        await asyncio.sleep(0.6)
        assert not drawing_.done()
        await away.peers[0].start()
        assert (await drawing_).token_ids == [7, 8, 1]
    finally:
        await away.stop()


async def test_a_generator_that_comes_back(one: Generators) -> None:
    one.scripts(0, GOOD)
    await one.peers[0].stop()
    drawing_ = asyncio.create_task(one.draw(TICKET))
    await asyncio.sleep(0.3)
    assert not drawing_.done()
    await one.peers[0].start()
    assert (await drawing_).token_ids == [7, 1]


async def test_a_reply_has_a_deadline_however_often_it_is_tried(tmp_path: Path) -> None:
    slow = Generators(tmp_path, 2, timeout_s=0.3)
    await slow.start()
    try:
        for number in range(2):
            slow.scripts(number, (event([7], 3), 30.0))
        with pytest.raises(Unavailable, match="DEADLINE_EXCEEDED"):
            await slow.draw(TICKET)
    finally:
        await slow.stop()


async def test_leaving_cancels_the_call(one: Generators) -> None:
    one.scripts(0, (event([7], 3), 30.0))
    drawing_ = asyncio.create_task(one.draw(TICKET))
    async with asyncio.timeout(20):
        await one.peers[0].generator.asked.wait()
        drawing_.cancel()
        await one.peers[0].generator.cancelled.wait()
    with pytest.raises(asyncio.CancelledError):
        await drawing_
    assert [standing.outstanding for standing in one.balancer.standings()] == [0]


async def test_a_group_and_later_turns_stay_where_their_prefix_is(two: Generators) -> None:
    for number in range(2):
        two.scripts(number, GOOD)
    group = [dataclasses.replace(TICKET, ref=TicketRef(JOB, 3, index)) for index in range(8)]
    await asyncio.gather(*(two.draw(ticket, turn=turn) for ticket in group for turn in range(2)))
    assert sorted(len(asked(two, number)) for number in range(2)) == [0, 16]


async def test_groups_are_spread_over_the_generators(two: Generators) -> None:
    for number in range(2):
        two.scripts(number, (0.05, *GOOD))
    groups = [dataclasses.replace(TICKET, ref=TicketRef(JOB, group, 0)) for group in range(16)]
    await asyncio.gather(*map(two.draw, groups))
    assert [len(asked(two, number)) for number in range(2)] == [8, 8]


async def test_generators_join_and_leave(two: Generators) -> None:
    two.list(1)
    await two.until_usable(1)
    for number in range(2):
        two.scripts(number, (event([7], 3), 0.3, event([1], 3, finish=STOP, engine=False)))
    drawing_ = asyncio.create_task(two.draw(TICKET))
    await two.peers[1].generator.asked.wait()
    # It leaves in mid-reply: what it has begun it may finish.
    two.list(0)
    await two.until_usable(0)
    assert (await drawing_).token_ids == [7, 1]
    assert two.retries == 0
    assert (await two.draw(TICKET)).token_ids == [7, 1]
    assert [len(asked(two, number)) for number in range(2)] == [1, 1]
    two.list(0, 1)
    await two.until_usable(0, 1)


async def test_one_that_may_not_be_talked_to_hurts_nobody_unless_there_is_no_other(two: Generators) -> None:
    # Off this machine, without TLS.
    two.file.write_text(f"{two.file.read_text()}\n192.0.2.1:7000\n")
    await asyncio.sleep(0.2)
    assert len(two.balancer.usable()) == 2
    alone = fleet.Fleet(JOB, AddressBook(["192.0.2.1:7000"]), two.dispatch, two.mover, two)
    with pytest.raises(BaseExceptionGroup) as caught:
        await asyncio.wait_for(alone.run(), 20)
    (error,) = caught.value.exceptions
    assert isinstance(error, ConfigError)


async def test_one_that_does_not_serve_or_is_another_jobs_is_not_used(two: Generators) -> None:
    for number in range(2):
        two.scripts(number, GOOD)
    await two.peers[0].serves(False)
    await two.until_usable(1)
    await two.draw(TICKET)
    assert asked(two, 0) == []
    await two.peers[0].serves(True)
    await two.until_usable(0, 1)

    async def refuse(request: object, context: Any) -> None:
        await context.abort(Code.INVALID_ARGUMENT, "this generator serves default/another")

    two.peers[1].generator.GetStatus = refuse  # type: ignore[method-assign, assignment]
    await two.peers[1].stop()
    await two.peers[1].start()
    await two.until_usable(0)


async def test_one_that_falls_silent_loses_what_it_was_drawing(
    two: Generators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_REPORT_TIMEOUT_S", 0.05)
    two.scripts(0, (event([7], 3), 600.0))
    two.scripts(1, rest)
    two.balancer.sent(two.peers[0].address, ["3.1"])
    drawing_ = asyncio.create_task(two.draw(TICKET))
    await two.peers[0].generator.asked.wait()

    async def silence(request: object, context: Any) -> None:
        await asyncio.sleep(600)

    two.peers[0].generator.status = None  # type: ignore[assignment]
    monkeypatch.setattr(type(two.peers[0].generator), "GetStatus", silence)
    reply = await drawing_
    assert (reply.token_ids, two.moves) == ([7, 8, 1], ["silent"])


async def test_a_reply_that_is_slow_where_it_is_goes_on_elsewhere(
    two: Generators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_LOOK_S", 0.05)
    monkeypatch.setattr(pace, "_WINDOW_S", 0.2)
    monkeypatch.setattr(pace, "_MIN_SAMPLES", 4)
    two.scripts(1, (event([9], 3), event([9] * 20, 3, engine=False), event([1], 3, finish=STOP, engine=False)))
    two.balancer.sent(two.peers[1].address, ["3.0"])
    sampling = Sampling(1.0, 64, (1,))
    quick = dataclasses.replace(TICKET, ref=TicketRef(JOB, 3, 0))
    for _ in range(4):
        await two.draw(quick, sampling)
    two.scripts(0, (event([7], 3), 600.0))
    two.scripts(1, rest)
    two.balancer.sent(two.peers[0].address, ["3.1"])
    # There must be something to spend.
    two.mover.earned(1000)
    reply = await two.draw(TICKET)
    assert (reply.token_ids, two.moves, two.retries) == ([7, 8, 1], ["slow"], 0)
    async with asyncio.timeout(20):
        await two.peers[0].generator.cancelled.wait()
