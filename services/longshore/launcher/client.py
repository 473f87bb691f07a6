"""The supervisor as its clients see it. Every call has a deadline; a supervisor that is away is Unavailable."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio

from longshore.errors import Conflict, LongshoreError, Rejected, Unavailable
from longshore.launcher import convert
from longshore.launcher.spec import ProcessSpec, UnitStatus
from longshore.proto.v1 import supervisor_pb2 as pb
from longshore.proto.v1 import supervisor_pb2_grpc as pb_grpc
from longshore.rpc.channel import channel

_APPLY_TIMEOUT_S = 10.0
# Longer than the supervisor's grace period, after which nothing is left to wait for.
_REMOVE_TIMEOUT_S = 30.0


class SupervisorClient:
    """Applies, removes and watches units over the supervisor's Unix socket."""

    def __init__(self, address: str) -> None:
        self._channel = channel(address)
        self._stub = pb_grpc.SupervisorServiceStub(self._channel)

    async def apply(self, unit: str, specs: Sequence[ProcessSpec]) -> None:
        """Raises Conflict, Rejected or Unavailable."""
        request = pb.ApplyRequest(unit=unit, processes=[convert.spec_to_proto(spec) for spec in specs])
        try:
            await self._stub.Apply(request, timeout=_APPLY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from None

    async def remove(self, unit: str, reason: str) -> None:
        """Returns once the unit's processes are gone. Raises Unavailable."""
        try:
            await self._stub.Remove(pb.RemoveRequest(unit=unit, reason=reason), timeout=_REMOVE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from None

    async def watch(self) -> AsyncIterator[dict[str, UnitStatus]]:
        """Every unit's state, at once and on every change, until the stream breaks. Raises Unavailable then."""
        try:
            async for answer in self._stub.WatchUnits(pb.WatchUnitsRequest()):
                yield {unit.unit: convert.unit_from_proto(unit) for unit in answer.units}
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from None

    async def close(self) -> None:
        await self._channel.close()


def _translated(error: grpc.aio.AioRpcError) -> LongshoreError:
    detail = error.details() or error.code().name
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return Conflict(detail)
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return Rejected("malformed", detail)
    return Unavailable(f"the supervisor did not answer: {detail}")
