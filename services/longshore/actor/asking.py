"""The stream to one generator, which carries all that is asked of it: opened when something is asked, and again after
it broke. What is asked while a message is on its way goes with the next one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator

import grpc
import grpc.aio

from longshore.proto.v1 import generator_pb2, generator_pb2_grpc, job_pb2
from longshore.rpc.channel import MAX_ASK_BYTES

_Code = grpc.StatusCode
_CODES = {code.value[0]: code for code in _Code}
# A message carries more requests until it has this many bytes; what one request adds besides its own bytes.
_FULL_BYTES = 1024 * 1024
_OVERHEAD_BYTES = 1024


class AskFailed(Exception):
    """A request ended without a finished reply."""

    def __init__(self, code: grpc.StatusCode, details: str, *, broke: bool = False) -> None:
        """
        Args:
            broke: it is the stream that ended, with this status, and all of its requests with it.
        """
        self.code = code
        self.details = details
        self.broke = broke
        super().__init__(f"{code.name}: {details}")


class Asking:
    """Asks one generator for replies. Belongs to one event loop; ended by `close`."""

    def __init__(self, channel: grpc.aio.Channel, job: job_pb2.JobRef) -> None:
        self._stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        self._job = job
        self._numbers = itertools.count(1)
        self._stream: _Stream | None = None

    async def reply(
        self, request: generator_pb2.ReplyRequest, timeout_s: float
    ) -> AsyncGenerator[generator_pb2.ReplyEvent]:
        """The events of one reply, the last one with `finish`; whoever wants no more of them closes the generator.

        Args:
            request: gets its number and its time here.

        Raises:
            AskFailed: it was refused or could not be finished, or the stream broke.
        """
        size = request.ByteSize()
        if size + _OVERHEAD_BYTES > MAX_ASK_BYTES:
            # The whole stream would end with it.
            raise AskFailed(_Code.INVALID_ARGUMENT, f"a request of {size} bytes; at most {MAX_ASK_BYTES} are taken")
        if self._stream is None or self._stream.has_ended:
            self._stream = _Stream(self._stub, self._job)
        request.call, request.timeout_s = next(self._numbers), timeout_s
        answer = self._stream.begin(request, size)
        late = AskFailed(_Code.DEADLINE_EXCEEDED, f"no whole reply within {timeout_s:.0f} s")
        timer = asyncio.get_running_loop().call_later(timeout_s, answer.fail, late)
        stream = self._stream
        try:
            while not answer.has_ended:
                for event in await answer.events():
                    yield event
        finally:
            timer.cancel()
            stream.end(answer)

    async def close(self) -> None:
        """Ends the stream and what is being drawn on it."""
        if self._stream is not None:
            await self._stream.close()


class _Answer:
    """What has come of one request and was not taken yet; bounded by the tokens of its reply."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.has_ended = False
        self._events: list[generator_pb2.ReplyEvent] = []
        self._failure: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None

    def add(self, event: generator_pb2.ReplyEvent) -> None:
        if event.HasField("failure"):
            code = _CODES.get(event.failure.code, _Code.UNKNOWN)
            self.fail(AskFailed(code, event.failure.message))
            return
        self._events.append(event)
        self._wake()

    def fail(self, failure: Exception) -> None:
        self._failure = failure
        self._wake()

    async def events(self) -> list[generator_pb2.ReplyEvent]:
        """Those that have come, at least one; `has_ended` tells that the last is among them. Raises AskFailed."""
        if not self._events and self._failure is None:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        if not self._events:
            assert self._failure is not None
            self.has_ended = isinstance(self._failure, AskFailed) and not self._failure.broke
            raise self._failure
        events, self._events = self._events, []
        self.has_ended = events[-1].finish != 0
        return events

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class _Stream:
    """One stream, from its opening to its end."""

    def __init__(self, stub: generator_pb2_grpc.GeneratorServiceAsyncStub, job: job_pb2.JobRef) -> None:
        self.has_ended = False
        self._job = job
        self._call = stub.Generate()
        self._answers: dict[int, _Answer] = {}
        # To be sent: requests with their sizes in bytes, and numbers of those that are no longer wanted.
        self._requests: list[tuple[generator_pb2.ReplyRequest, int]] = []
        self._cancelled: list[int] = []
        self._wake = asyncio.Event()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    def begin(self, request: generator_pb2.ReplyRequest, size: int) -> _Answer:
        answer = self._answers[request.call] = _Answer(request.call)
        self._requests.append((request, size))
        self._wake.set()
        return answer

    def end(self, answer: _Answer) -> None:
        """Nobody reads an answer any more; its request is cancelled if it has not ended."""
        del self._answers[answer.number]
        if answer.has_ended or self.has_ended:
            return
        unsent = [item for item in self._requests if item[0].call != answer.number]
        if len(unsent) == len(self._requests):
            self._cancelled.append(answer.number)
            self._wake.set()
        self._requests = unsent

    async def close(self) -> None:
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self) -> None:
        try:
            while not self.has_ended:
                if self._requests or self._cancelled:
                    await self._call.write(self._message())
                else:
                    self._wake.clear()
                    await self._wake.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The stream has ended: `_read` says how.
            return
        except Exception as error:  # noqa: BLE001 - the task's end: whoever waits for an answer raises it
            self._end(error)

    def _message(self) -> generator_pb2.GenerateRequest:
        size, count = 0, 0
        for _, more in self._requests:
            if count and size + more > _FULL_BYTES:
                break
            size, count = size + more, count + 1
        requests = [request for request, _ in self._requests[:count]]
        del self._requests[:count]
        cancelled, self._cancelled = self._cancelled, []
        return generator_pb2.GenerateRequest(job=self._job, requests=requests, cancelled=cancelled)

    async def _read(self) -> None:
        try:
            async for response in self._call:
                for event in response.events:
                    answer = self._answers.get(event.call)
                    if answer is not None:
                        answer.add(event)
        except grpc.aio.AioRpcError as error:
            self._end(AskFailed(error.code(), error.details() or "", broke=True))
        except asyncio.CancelledError:
            self._end(AskFailed(_Code.CANCELLED, "the stream was closed", broke=True))
            raise
        except Exception as error:  # noqa: BLE001 - the same
            self._end(error)
        else:
            self._end(AskFailed(_Code.UNAVAILABLE, "the generator has ended the stream", broke=True))

    def _end(self, failure: Exception) -> None:
        self.has_ended = True
        self._call.cancel()
        for answer in self._answers.values():
            answer.fail(failure)
        self._wake.set()
