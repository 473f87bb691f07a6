"""The generators and the verifier as an episode sees them."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable

import grpc
import grpc.aio

from longshore.actor.drawing import Drawer, Wanted
from longshore.actor.episode import Reply
from longshore.actor.retry import persist
from longshore.errors import Rejected, Unavailable
from longshore.proto.v1 import verdict_pb2, verifier_pb2, verifier_pb2_grpc
from longshore.rpc import convert
from longshore.tasks.verification import ScoreRequest
from longshore.types import Sampling, Ticket, Verdict, VersionConstraint

_Code = grpc.StatusCode
# Tries of one score that the verifier itself gave up on: a reply that breaks a scorer breaks it again.
MAX_SCORE_TRIES = 2


class GeneratorClient:
    """Draws replies for any number of rollouts."""

    def __init__(self, drawer: Drawer) -> None:
        self._drawer = drawer

    async def generate(
        self, ticket: Ticket, attempt: int, token_ids: list[int], sampling: Sampling, turn: int
    ) -> Reply:
        """One reply. Raises what Drawer.draw raises."""
        wanted = Wanted(
            name=f"{ticket.ref.key}/{attempt}/{turn}",
            token_ids=token_ids,
            sampling=sampling,
            prefixes=(ticket.ref.key, str(ticket.ref.group_id)),
            version=ticket.version or VersionConstraint(),
        )
        return await self._drawer.draw(wanted)


class VerifierClient:
    """Scores rollouts over one channel."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        score_timeout_s: float,
        patience_s: float,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        self._stub = verifier_pb2_grpc.VerifierServiceStub(channel)
        # The verifier keeps the scorer's limit; ours leaves as much again as a peer may be away, for the queue.
        self._timeout_s = score_timeout_s + patience_s
        self._patience_s = patience_s
        self._on_retry = on_retry

    async def verify(self, ticket: Ticket, attempt: int, request: ScoreRequest) -> Verdict | None:
        """The verdict, or None when it comes later.

        Raises:
            Rejected: reasons `verifier_refused`, `verifier_timeout`, `verifier_failed`, or the verdict is malformed.
            Unavailable: no verifier answered within the patience.
        """
        message = verifier_pb2.VerifyRequest(
            job=convert.job_to_proto(ticket.ref.job),
            ref=convert.ref_to_proto(ticket.ref),
            attempt=attempt,
            task=convert.task_to_proto(request.task),
            conversation=[convert.message_to_proto(item) for item in request.conversation],
            reply=request.reply,
            turn_info_json=[json.dumps(info) for info in request.turn_info],
            role=verdict_pb2.VERDICT_ROLE_TRAIN,
        )
        failures = itertools.count(1)
        response = await persist(lambda: self._once(message, failures), self._patience_s, self._on_retry)
        return convert.verdict_from_proto(response.verdict) if response.HasField("verdict") else None

    async def _once(
        self, message: verifier_pb2.VerifyRequest, failures: itertools.count[int]
    ) -> verifier_pb2.VerifyResponse:
        deadline = time.monotonic() + self._timeout_s
        try:
            return await self._stub.Verify(message, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is _Code.INVALID_ARGUMENT:
                raise Rejected("verifier_refused", _text(error)) from None
            # Our own deadline says that the verifier is busy or stuck, its own that the scorer was too slow.
            timed_out = error.code() is _Code.DEADLINE_EXCEEDED and time.monotonic() < deadline
            failed = error.code() in (_Code.INTERNAL, _Code.UNKNOWN, _Code.UNIMPLEMENTED)
            if (timed_out or failed) and next(failures) >= MAX_SCORE_TRIES:
                raise Rejected("verifier_timeout" if timed_out else "verifier_failed", _text(error)) from None
            raise Unavailable(f"verifier: {_text(error)}") from None


def _text(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"
