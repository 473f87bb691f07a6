"""One caller's stream: what becomes of its requests, and when it has ended."""

from __future__ import annotations

import asyncio
import time

import pytest

from longshore.errors import NotFound, Rejected, Unavailable
from longshore.generator import caller as caller_module
from longshore.generator.caller import Caller, NotHere, Refused, Running
from longshore.generator.calls import Calls
from longshore.generator.engine import (
    EngineLimits,
    EngineRequest,
    EngineStatus,
    Failure,
    QueueFull,
    RequestFailed,
    TokensDrawn,
)
from longshore.types import FinishReason, JobRef, KvMark, Sampling, VersionConstraint

WAIT_S = 10.0


class Engine:
    """Says what it is told to say; version 5 is served."""

    limits = EngineLimits(vocab_size=10, context=100, slots=2, max_waiting=2)

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.aborted: list[str] = []
        self.is_full = False

    def submit(self, request: EngineRequest) -> None:
        if self.is_full:
            raise QueueFull("2 requests wait already")
        self.submitted.append(request.request_id)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def status(self) -> EngineStatus:
        return EngineStatus(5, 0, 0, 0.0)


class Bench:
    """An engine, and what two streams ask of it."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.calls = Calls(JobRef("p", "j"))
        self.calls.engine = self.engine  # type: ignore[assignment]
        self.bringing = asyncio.Event()
        self.error: Exception | None = None
        self.calls.keep = self._keep
        names: set[str] = set()
        self.one, self.two = Caller(self.calls, names), Caller(self.calls, names)

    async def _keep(self, version: int) -> None:
        await self.bringing.wait()
        if self.error is not None:
            raise self.error

    def begin(self, caller: Caller, number: int, name: str, version: int | None = None) -> None:
        bounds = VersionConstraint(version, version)
        request = EngineRequest(name, (1,), Sampling(1.0, 4), time.monotonic() + WAIT_S, bounds)
        caller.begin(number, name, request)

    async def draws(self, name: str, *tokens: int, finish: FinishReason | None = None) -> None:
        logprobs = (-0.5,) * len(tokens)
        self.calls.deliver([TokensDrawn(name, tokens, logprobs, 5, KvMark.RECOMPUTED, finish=finish)])
        await asyncio.sleep(0)


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def told(caller: Caller) -> list[tuple[int, object, bool]]:
    """What is told next: tokens, a failure, or the class of a refusal."""
    said = []
    for item in await asyncio.wait_for(caller.told(), WAIT_S):
        event = item.event
        what: object = event.token_ids if isinstance(event, TokensDrawn) else event
        said.append((item.number, type(event.error) if isinstance(event, Refused) else what, item.is_first))
    return said


async def test_what_came_since_the_last_message_is_told_together(bench: Bench) -> None:
    for number, name in enumerate("ab"):
        bench.begin(bench.one, number, name)
    await bench.draws("a", 1)
    await bench.draws("b", 2)
    assert await told(bench.one) == [(0, (1,), True), (1, (2,), True)]
    await bench.draws("a", 3, finish=FinishReason.STOP)
    failed = RequestFailed("b", Failure.DEADLINE, "late")
    bench.calls.deliver([failed])
    await asyncio.sleep(0)
    assert await told(bench.one) == [(0, (3,), False), (1, failed, False)]
    # Numbers and names are free again, and nothing had to be aborted.
    bench.begin(bench.one, 0, "a")
    assert bench.engine.aborted == []


async def test_a_request_that_cannot_be_taken_is_told_so_and_harms_no_other(bench: Bench) -> None:
    bench.begin(bench.one, 0, "a")
    bench.begin(bench.two, 0, "a")
    bench.engine.is_full = True
    bench.begin(bench.two, 1, "b")
    bench.two.refuse(2, Unavailable("none"))
    assert await told(bench.two) == [(0, Running, True), (1, QueueFull, True), (2, Unavailable, True)]
    await bench.draws("a", 1, finish=FinishReason.STOP)
    assert await told(bench.one) == [(0, (1,), True)]


async def test_a_number_in_use_is_refused_wherever_its_request_is(bench: Bench) -> None:
    bench.begin(bench.one, 0, "a")
    bench.begin(bench.one, 1, "b", version=3)
    for number in range(2):
        with pytest.raises(Rejected, match=f"call {number} has not ended"):
            bench.begin(bench.one, number, "c")


async def test_a_version_that_is_brought_lets_others_pass(bench: Bench) -> None:
    bench.begin(bench.one, 0, "a", version=3)
    bench.begin(bench.one, 1, "b")
    await bench.draws("b", 2, finish=FinishReason.STOP)
    assert await told(bench.one) == [(1, (2,), True)]
    bench.bringing.set()
    await asyncio.sleep(0.01)
    assert bench.engine.submitted == ["b", "a"]


@pytest.mark.parametrize(("error", "refusal"), [(Unavailable("no room"), NotHere), (NotFound("gone"), NotFound)])
async def test_a_version_that_cannot_be_brought_refuses_its_request(
    bench: Bench, error: Exception, refusal: type[Exception]
) -> None:
    bench.error = error
    bench.begin(bench.one, 0, "a", version=3)
    bench.one.no_more()
    bench.bringing.set()
    assert await told(bench.one) == [(0, refusal, True)]
    assert await told(bench.one) == []


async def test_no_more_versions_are_brought_at_a_time_than_requests_may_wait(bench: Bench) -> None:
    for number in range(3):
        bench.begin(bench.one, number, str(number), version=number)
    assert await told(bench.one) == [(2, QueueFull, True)]


async def test_cancelled_requests_end_without_a_word(bench: Bench) -> None:
    bench.begin(bench.one, 0, "a")
    bench.begin(bench.one, 1, "b", version=3)
    for number in range(3):
        bench.one.cancel(number)
    assert bench.engine.aborted == ["a"]
    await bench.draws("a", 1)
    bench.bringing.set()
    await asyncio.sleep(0.01)
    assert bench.engine.submitted == ["a"]
    bench.one.no_more()
    assert await told(bench.one) == []


async def test_a_stream_ends_with_its_last_request(bench: Bench) -> None:
    bench.begin(bench.one, 0, "a")
    bench.one.no_more()
    ending = asyncio.create_task(told(bench.one))
    await bench.draws("a", 1)
    assert await ending == [(0, (1,), True)]
    ending = asyncio.create_task(told(bench.one))
    await asyncio.sleep(0.01)
    bench.one.cancel(0)
    assert await ending == []


async def test_a_stream_that_is_closed_ends_its_requests_and_no_others(bench: Bench) -> None:
    bench.begin(bench.one, 0, "a")
    bench.begin(bench.two, 0, "b")
    bench.one.close()
    assert bench.engine.aborted == ["a"]
    bench.begin(bench.two, 1, "a")
    await bench.draws("a", 1)
    assert await told(bench.two) == [(1, (1,), True)]


async def test_a_bug_ends_the_request_that_met_it(bench: Bench) -> None:
    bench.error = ZeroDivisionError("a secret")
    bench.begin(bench.one, 0, "a", version=3)
    bench.begin(bench.one, 1, "b")
    bench.bringing.set()
    (item,) = await asyncio.wait_for(bench.one.told(), WAIT_S)
    assert isinstance(item.event, Refused)
    assert (item.number, "internal error" in str(item.event.error), "secret" in str(item.event.error)) == (
        0,
        True,
        False,
    )
    await bench.draws("b", 2)
    assert await told(bench.one) == [(1, (2,), True)]


async def test_what_breaks_the_stream_is_raised_once_all_has_been_told(bench: Bench) -> None:
    bench.one.refuse(0, Unavailable("none"))
    bench.one.no_more(Rejected("malformed", "call 0 has not ended"))
    assert await told(bench.one) == [(0, Unavailable, True)]
    with pytest.raises(Rejected):
        await told(bench.one)


async def test_who_does_not_read_is_not_asked_for_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller_module, "_MOST_TOLD", 2)
    for number in range(3):
        bench.one.refuse(number, Unavailable("none"))
    waiting = asyncio.create_task(bench.one.has_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert len(await told(bench.one)) == 2
    await asyncio.wait_for(waiting, WAIT_S)
    assert len(await told(bench.one)) == 1
