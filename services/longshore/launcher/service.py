"""SupervisorService on the wire: translates, decides nothing. Its Unix socket is private to its owner."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from longshore.launcher import convert
from longshore.launcher.supervisor import Supervisor
from longshore.proto.v1 import supervisor_pb2 as pb
from longshore.proto.v1 import supervisor_pb2_grpc as pb_grpc
from longshore.rpc.server import rpc_method, rpc_stream

Context = grpc.aio.ServicerContext[Any, Any]


class SupervisorService(pb_grpc.SupervisorServiceServicer):
    """See supervisor.proto."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    @rpc_method
    async def Apply(self, request: pb.ApplyRequest, context: Context) -> pb.ApplyResponse:  # noqa: N802
        specs = [convert.spec_from_proto(process) for process in request.processes]
        await self._supervisor.apply(request.unit, specs)
        return pb.ApplyResponse()

    @rpc_method
    async def Remove(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveResponse:  # noqa: N802
        await self._supervisor.remove(request.unit, request.reason)
        return pb.RemoveResponse()

    @rpc_stream
    async def WatchUnits(  # noqa: N802
        self, request: pb.WatchUnitsRequest, context: Context
    ) -> AsyncIterator[pb.WatchUnitsResponse]:
        async for units in self._supervisor.watch():
            yield pb.WatchUnitsResponse(units=[convert.unit_to_proto(unit) for unit in units])
