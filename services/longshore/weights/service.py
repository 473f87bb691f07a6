"""The weight store's process: the origin of every job's versions."""

from __future__ import annotations

import asyncio

from longshore.proto.v1 import weights_pb2_grpc
from longshore.rpc.process import run_process
from longshore.rpc.server import RpcServer
from longshore.weight_store.objects import open_objects
from longshore.weight_store.servicer import SERVICE, WeightsServicer
from longshore.weight_store.store import WeightStore
from longshore.weights.config import WeightsSettings


async def serve(settings: WeightsSettings, stop: asyncio.Event) -> None:
    """Serves until `stop` is set, then drains. Raises ConfigError."""
    objects = open_objects(settings.store_url)
    servicer = WeightsServicer(WeightStore(objects), str(objects.root) if objects.root else None)
    server = RpcServer(settings.listen)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(servicer, server.server)
    await server.start()
    await server.set_serving(SERVICE, True)
    await stop.wait()
    servicer.close()
    await server.drain(settings.drain_s)


def main() -> int:
    return run_process("weights", WeightsSettings.from_environment(), serve)
