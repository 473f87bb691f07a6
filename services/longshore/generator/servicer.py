"""Translates Generate for the engine, and the engine's events for the callers."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from longshore.errors import Rejected, Unavailable
from longshore.generator.caller import Caller, NotHere, Refused, Running, Told
from longshore.generator.calls import Calls
from longshore.generator.engine import Engine, EngineRequest, Failure, QueueFull, RequestFailed, check_length
from longshore.proto.v1 import generator_pb2, generator_pb2_grpc, rollout_pb2
from longshore.rpc import convert
from longshore.rpc.convert_rollout import engine_to_proto
from longshore.rpc.rollout_checks import MAX_NAME_CHARACTERS
from longshore.rpc.server import rpc_method, status_of
from longshore.types import JobRef, VersionConstraint

SERVICE = "longshore.proto.v1.GeneratorService"

_FAILED = {
    Failure.VERSION: grpc.StatusCode.FAILED_PRECONDITION,
    Failure.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Failure.REFUSED: grpc.StatusCode.INVALID_ARGUMENT,
}
_REFUSED = {
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotHere: grpc.StatusCode.ABORTED,
    Running: grpc.StatusCode.ALREADY_EXISTS,
}
_Context = grpc.aio.ServicerContext[Any, Any]


class GeneratorServicer(generator_pb2_grpc.GeneratorServiceServicer):
    """All callers' streams."""

    def __init__(self, job: JobRef, calls: Calls, max_request_s: float) -> None:
        self._job = job
        self._calls = calls
        self._max_request_s = max_request_s
        # Ids of the callers' own, of requests that run.
        self._names: set[str] = set()
        self._callers: set[Caller] = set()
        self._draining = False

    def drain(self) -> None:
        """Takes no further request; a stream ends when its last one has."""
        self._draining = True
        for caller in self._callers:
            caller.no_more()

    @rpc_method
    async def Generate(  # type: ignore[override] # noqa: N802 - written to, not iterated; the name is the contract's
        self, request_iterator: AsyncIterator[generator_pb2.GenerateRequest], context: _Context
    ) -> None:
        caller = Caller(self._calls, self._names)
        self._callers.add(caller)
        if self._draining:
            caller.no_more()
        asking = asyncio.create_task(self._ask(request_iterator, caller))
        try:
            while told := await caller.told():
                await context.write(self._response(told))
        finally:
            asking.cancel()
            caller.close()
            self._callers.remove(caller)

    @rpc_method
    async def GetStatus(  # noqa: N802 - the name is the contract's
        self, request: generator_pb2.GetStatusRequest, context: _Context
    ) -> generator_pb2.GetStatusResponse:
        self._check_job(request.job)
        engine = self._calls.engine
        if engine is None:
            return generator_pb2.GetStatusResponse()
        status = engine.status()
        return generator_pb2.GetStatusResponse(
            policy_version=status.version,
            running_requests=status.running,
            waiting_requests=status.waiting,
            max_running_requests=engine.limits.slots,
            kv_used_ratio=status.kv_used_ratio,
            engine=engine_to_proto(engine.fingerprint),
            resident_versions=() if status.version is None else (status.version, *status.beside),
        )

    async def _ask(self, messages: AsyncIterator[generator_pb2.GenerateRequest], caller: Caller) -> None:
        """Takes what a caller asks for, until it asks for no more; what ends it, ends the stream."""
        try:
            async for message in messages:
                self._take(message, caller)
                await caller.has_room()
        except Exception as error:  # noqa: BLE001 - the task's end: the stream ends with it
            caller.no_more(error)
        else:
            caller.no_more()

    def _take(self, message: generator_pb2.GenerateRequest, caller: Caller) -> None:
        """Raises Rejected for what ends the stream."""
        for number in message.cancelled:
            caller.cancel(number)
        for request in message.requests:
            caller.check(request.call)
            try:
                self._check_job(message.job)
                if self._draining:
                    raise Unavailable("this generator is going away")
                caller.begin(request.call, request.request_id, self._request(self._calls.proven(), request))
            except (Rejected, Unavailable) as error:
                caller.refuse(request.call, error)
            except Exception as error:  # noqa: BLE001 - a request's boundary
                caller.fail(request.call, error)

    def _request(self, engine: Engine, request: generator_pb2.ReplyRequest) -> EngineRequest:
        for name, text in (("request_id", request.request_id), ("prefix_key", request.prefix_key)):
            if len(text) > MAX_NAME_CHARACTERS:
                raise Rejected("malformed", f"{name} has {len(text)} characters, at most {MAX_NAME_CHARACTERS}")
        if not request.request_id:
            raise Rejected("malformed", "request_id must not be empty")
        # Before the ids become Python's integers, which take ten times the room.
        check_length(len(request.token_ids), engine.limits)
        if request.attachments:
            raise Rejected("attachments", "this engine takes token ids alone")
        if math.isnan(request.timeout_s):
            raise Rejected("malformed", "timeout_s must be a number")
        seconds = min(request.timeout_s, self._max_request_s) if request.HasField("timeout_s") else self._max_request_s
        version = convert.version_from_proto(request.version) if request.HasField("version") else VersionConstraint()
        return EngineRequest(
            request_id=self._calls.new_id(),
            token_ids=tuple(request.token_ids),
            sampling=convert.sampling_from_proto(request.sampling),
            deadline=time.monotonic() + seconds,
            version=version,
        )

    def _check_job(self, job: Any) -> None:
        if convert.job_from_proto(job) != self._job:
            raise Rejected("job", f"this generator serves {self._job}")

    def _response(self, told: list[Told]) -> generator_pb2.GenerateResponse:
        response = generator_pb2.GenerateResponse()
        for item in told:
            event = item.event
            if isinstance(event, Refused):
                code = next((code for kind, code in _REFUSED.items() if isinstance(event.error, kind)), None)
                _add_failure(response, item.number, code or status_of(event.error), str(event.error))
            elif isinstance(event, RequestFailed):
                _add_failure(response, item.number, _FAILED[event.failure], event.message)
            else:
                response.events.add(
                    call=item.number,
                    token_ids=event.token_ids,
                    logprobs=event.logprobs,
                    policy_version=event.version,
                    kv=convert.KV[event.kv],
                    kv_min_version=event.kv_min_version,
                    finish=rollout_pb2.FINISH_REASON_UNSPECIFIED
                    if event.finish is None
                    else convert.FINISH[event.finish],
                    engine=_engine(self._calls.proven().fingerprint) if item.is_first else None,
                )
        return response


_engine = functools.cache(engine_to_proto)


def _add_failure(response: generator_pb2.GenerateResponse, number: int, code: grpc.StatusCode, text: str) -> None:
    response.events.add(call=number, failure=generator_pb2.ReplyFailure(code=code.value[0], message=text))
