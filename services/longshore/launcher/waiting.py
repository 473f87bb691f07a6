"""The process behind `longshore wait SERVICE`: a worker on its socket, until it is told to stop."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import prometheus_client

from longshore.errors import ConfigError
from longshore.launcher.child_metrics import ChildMetrics
from longshore.launcher.probe import probe
from longshore.launcher.service import SupervisorService
from longshore.launcher.worker import Worker
from longshore.launcher.worker_config import WorkerSettings
from longshore.proto.v1.supervisor_pb2_grpc import add_SupervisorServiceServicer_to_server
from longshore.rpc.process import run_process
from longshore.rpc.server import RpcServer


async def serve(service: str, settings: WorkerSettings, stop: asyncio.Event) -> None:
    """Runs what it is given until `stop`, then ends it. Raises ConfigError when the folder cannot be used."""
    address = settings.address(service)
    if not settings.sockets_dir.is_dir():
        raise ConfigError(f"LONGSHORE_SOCKETS_DIR {settings.sockets_dir}: there is no such folder")
    worker = Worker(service, settings.places, probe)
    children = ChildMetrics(worker.metrics_addresses)
    prometheus_client.REGISTRY.register(children)
    server = RpcServer(address)
    add_SupervisorServiceServicer_to_server(SupervisorService(worker), server.server)
    try:
        await server.start()
        await stop.wait()
    finally:
        await worker.close("")
        await server.drain(0.0)
        prometheus_client.REGISTRY.unregister(children)
        await asyncio.to_thread(Path(address.removeprefix("unix:")).unlink, missing_ok=True)


def main(service: str) -> int:
    """Entry of `longshore wait SERVICE`."""
    return run_process(f"{service}-worker", WorkerSettings.from_environment(), functools.partial(serve, service))
