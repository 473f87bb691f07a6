"""The stream that carries all that an actor asks of one generator, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from processes import free_port
from scripted_peers import Peers, ScriptedGenerator, ScriptedVerifier, event

from longshore.actor import asking
from longshore.actor.asking import AskFailed, Asking
from longshore.proto.v1 import generator_pb2, job_pb2, rollout_pb2
from longshore.rpc.channel import channel

Code = grpc.StatusCode
STOP = rollout_pb2.FINISH_REASON_STOP
WAIT_S = 20.0
GOOD = (event([7]), event([8], finish=STOP))


class Bench:
    """A generator, and an actor's stream to it."""

    def __init__(self) -> None:
        self.generator = ScriptedGenerator(GOOD)
        self.peers = Peers(self.generator, ScriptedVerifier(), free_port())
        self._channel = channel(self.peers.address, retries=False)
        self.asking = Asking(self._channel, job_pb2.JobRef(project="default", job="j"))

    async def reply(self, name: str = "r", *, tokens: int = 2, timeout_s: float = WAIT_S) -> list[int]:
        request = generator_pb2.ReplyRequest(request_id=name, token_ids=[5] * tokens)
        drawn: list[int] = []
        async with asyncio.timeout(WAIT_S), aclosing(self.asking.reply(request, timeout_s)) as events:
            async for item in events:
                drawn += item.token_ids
        return drawn

    async def failure(self, name: str = "r", **options: Any) -> AskFailed:
        with pytest.raises(AskFailed) as caught:
            await self.reply(name, **options)
        return caught.value

    async def close(self) -> None:
        await self.asking.close()
        await self._channel.close()
        await self.peers.stop()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    await made.peers.start()
    yield made
    await made.close()


async def test_what_is_asked_at_once_goes_in_one_message(bench: Bench) -> None:
    replies = await asyncio.gather(*(bench.reply(str(number)) for number in range(50)))
    assert replies == [[7, 8]] * 50
    assert len(bench.generator.jobs) == 1
    # A stream stays for what is asked later.
    assert await bench.reply() == [7, 8]
    assert (bench.generator.streams, len(bench.generator.jobs)) == (1, 2)


async def test_a_message_is_no_larger_than_need_be(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_FULL_BYTES", 1000)
    replies = await asyncio.gather(*(bench.reply(str(number), tokens=400) for number in range(9)))
    assert (replies, len(bench.generator.jobs)) == ([[7, 8]] * 9, 5)


async def test_each_request_fails_by_itself(bench: Bench) -> None:
    bench.generator.scripts = [(event([7]), Code.ABORTED), (Code.INVALID_ARGUMENT,), (0.1, *GOOD)]
    first, second, third = await asyncio.gather(bench.failure("0"), bench.failure("1"), bench.reply("2"))
    assert [(failed.code, failed.broke) for failed in (first, second)] == [
        (Code.ABORTED, False),
        (Code.INVALID_ARGUMENT, False),
    ]
    assert (third, bench.generator.streams) == ([7, 8], 1)


async def test_what_a_message_cannot_hold_is_not_sent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MAX_ASK_BYTES", 2000)
    good, large = await asyncio.gather(bench.reply(), bench.failure(tokens=4000))
    assert (good, large.code, large.broke) == ([7, 8], Code.INVALID_ARGUMENT, False)
    assert len(bench.generator.requests) == 1


async def test_who_wants_no_more_cancels_one_request(bench: Bench) -> None:
    bench.generator.scripts = [(0.3, *GOOD), (event([7]), WAIT_S)]
    other = asyncio.create_task(bench.reply("kept"))
    await bench.generator.asked.wait()
    request = generator_pb2.ReplyRequest(request_id="left", token_ids=[5])
    async with aclosing(bench.asking.reply(request, WAIT_S)) as events:
        assert list((await anext(events)).token_ids) == [7]
    await asyncio.wait_for(bench.generator.cancelled.wait(), WAIT_S)
    assert (await other, bench.generator.streams) == ([7, 8], 1)


async def test_who_leaves_before_the_request_has_been_sent_was_never_there(bench: Bench) -> None:
    assert await bench.reply("before") == [7, 8]
    stream = bench.asking._stream
    assert stream is not None
    stream.end(stream.begin(generator_pb2.ReplyRequest(call=99, request_id="left"), 10))
    assert await bench.reply("kept") == [7, 8]
    assert [request.request_id for request in bench.generator.requests] == ["before", "kept"]


async def test_a_generator_that_stands_still_is_waited_for_no_longer_than_asked(bench: Bench) -> None:
    bench.generator.scripts = [(event([7]), WAIT_S), GOOD]
    late = await bench.failure("0", timeout_s=0.2)
    assert (late.code, late.broke) == (Code.DEADLINE_EXCEEDED, False)
    assert bench.generator.requests[0].timeout_s == pytest.approx(0.2)
    assert await bench.reply("1") == [7, 8]


async def test_a_stream_that_breaks_takes_its_requests_with_it_and_is_opened_anew(bench: Bench) -> None:
    # The generator ends the stream under the first, in mid-reply; the second has all of its tokens by then.
    bench.generator.scripts = [(event([7]), 0.2), GOOD, (WAIT_S,), GOOD]
    broken, good, other = await asyncio.gather(bench.failure("0"), bench.reply("1"), bench.failure("2"))
    assert [(failed.code, failed.broke) for failed in (broken, other)] == [(Code.UNAVAILABLE, True)] * 2
    assert good == [7, 8]
    assert await bench.reply("3") == [7, 8]
    await bench.peers.stop()
    gone = await bench.failure("4")
    assert (gone.code, gone.broke) == (Code.UNAVAILABLE, True)


async def test_closing_ends_what_is_being_drawn(bench: Bench) -> None:
    bench.generator.scripts = [(event([7]), WAIT_S)]
    async with aclosing(bench.asking.reply(generator_pb2.ReplyRequest(request_id="r"), WAIT_S)) as events:
        await anext(events)
        await bench.asking.close()
        with pytest.raises(AskFailed) as caught:
            await anext(events)
    assert (caught.value.code, caught.value.broke) == (Code.CANCELLED, True)
    await asyncio.wait_for(bench.generator.cancelled.wait(), WAIT_S)
