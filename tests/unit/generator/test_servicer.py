"""Generate over real gRPC, in front of an engine that draws what a request's prompt says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from generator_store import Caller, Code, ReplyFailed, tokens_of

from longshore.generator.calls import Calls
from longshore.generator.engine import EngineLimits, EngineRequest, EngineStatus, TokensDrawn
from longshore.generator.servicer import GeneratorServicer
from longshore.proto.v1 import generator_pb2, generator_pb2_grpc
from longshore.types import EngineFingerprint, FinishReason, JobRef, KvMark

JOB = JobRef("default", "j")
# Prompts: one that is never answered, and one that the engine cannot bear.
SILENT, BUG = 8, 9


class Engine:
    """Says the prompt again, half of it at a time."""

    fingerprint = EngineFingerprint("echo", "1", "float32", "none")
    limits = EngineLimits(vocab_size=10, context=100, slots=8, max_waiting=8)

    def __init__(self, calls: Calls) -> None:
        self.aborted: list[str] = []
        self._calls = calls

    def submit(self, request: EngineRequest) -> None:
        tokens = request.token_ids
        if BUG in tokens:
            raise ZeroDivisionError("a secret")
        if SILENT not in tokens:
            for part, finish in ((tokens[::2], None), (tokens[1::2], FinishReason.LENGTH)):
                logprobs = (-0.5,) * len(part)
                event = TokensDrawn(request.request_id, part, logprobs, 3, KvMark.CARRIED, 2, finish)
                self._calls.deliver([event])

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def status(self) -> EngineStatus:
        return EngineStatus(3, 0, 0, 0.0)


class Bench:
    """The servicer on a socket, and a client of it."""

    def __init__(self, folder: Path) -> None:
        calls = Calls(JOB)
        self.engine = Engine(calls)
        calls.engine = self.engine  # type: ignore[assignment]
        self.servicer = GeneratorServicer(JOB, calls, max_request_s=30.0)
        self.server = grpc.aio.server()
        generator_pb2_grpc.add_GeneratorServiceServicer_to_server(self.servicer, self.server)
        address = f"unix:{folder}/g.sock"
        self.server.add_insecure_port(address)
        self.caller = Caller(JOB, address)

    async def until_aborted(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.engine.aborted) < count:  # noqa: ASYNC110 - it is told by nobody
                await asyncio.sleep(0.01)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    await made.server.start()
    yield made
    await made.caller.channel.close()
    await made.server.stop(None)


async def test_events_say_what_made_them_and_the_first_by_which_engine(bench: Bench) -> None:
    first, last = await bench.caller.reply((1, 2, 3))
    assert (list(first.token_ids), list(last.token_ids)) == ([1, 3], [2])
    assert (first.policy_version, first.kv_min_version, list(last.logprobs)) == (3, 2, [-0.5])
    assert (first.engine.engine, first.finish, last.HasField("engine")) == ("echo", 0, False)


async def test_a_bug_that_one_request_meets_leaves_the_others_alone(bench: Bench) -> None:
    caller = bench.caller
    stream = caller.send(caller.message(caller.request((BUG,), call=1), caller.request((1, 2), call=2))).stream
    events: list[generator_pb2.ReplyEvent] = []
    while (message := await stream.read()) is not grpc.aio.EOF:
        events += message.events
    (failed,) = [event for event in events if event.call == 1]
    assert failed.failure.code == Code.INTERNAL.value[0]
    assert "secret" not in failed.failure.message
    assert tokens_of([event for event in events if event.call == 2]) == [1, 2]


async def test_a_caller_that_goes_away_ends_its_requests(bench: Bench) -> None:
    caller = bench.caller
    stream = caller.send(caller.message(*(caller.request((SILENT,), call=number) for number in range(3)))).stream
    await caller.reply()
    stream.cancel()
    await bench.until_aborted(3)


async def test_draining_takes_no_more_and_ends_streams_when_they_have_nothing_left(bench: Bench) -> None:
    caller = bench.caller
    stream = caller.stub.Generate(timeout=30)
    await stream.write(caller.message(caller.request((SILENT,), call=1), caller.request((1,), call=2)))
    assert {event.call for event in (await stream.read()).events} == {2}
    idle = caller.stub.Generate(timeout=30)
    await idle.write(generator_pb2.GenerateRequest(job=caller.job))
    await caller.status()
    bench.servicer.drain()
    assert await idle.read() is grpc.aio.EOF
    with pytest.raises(ReplyFailed):
        await caller.reply()
    await stream.write(caller.message(caller.request(call=3)))
    (refused,) = (await stream.read()).events
    assert (refused.call, refused.failure.code) == (3, Code.UNAVAILABLE.value[0])
    await stream.write(generator_pb2.GenerateRequest(job=caller.job, cancelled=[1]))
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() is Code.OK
