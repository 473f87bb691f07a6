"""The process behind `longshore wait SERVICE`: a worker on its socket, until it is told to stop."""

from __future__ import annotations

import asyncio
import functools
import re
import socket
from pathlib import Path

import prometheus_client
from pydantic import Field

from longshore.errors import ConfigError
from longshore.launcher.child_metrics import ChildMetrics
from longshore.launcher.probe import probe
from longshore.launcher.service import SupervisorService
from longshore.launcher.worker import Worker
from longshore.launcher.worker_sockets import WORKER_SERVICES, WorkerName
from longshore.proto.v1.supervisor_pb2_grpc import add_SupervisorServiceServicer_to_server
from longshore.rpc.process import run_process
from longshore.rpc.server import RpcServer
from longshore.settings import ProcessSettings


class WorkerSettings(ProcessSettings):
    """Settings of one worker. What it runs gets the gateway's settings above the worker's own."""

    sockets_dir: Path = Field(description="folder that the gateway and every worker share")
    places: int = Field(4, ge=1, le=999, description="processes that it runs at a time")

    def address(self, service: str) -> str:
        """Raises ConfigError for a service that waits for nothing."""
        if service not in WORKER_SERVICES:
            raise ConfigError(f"{service} does not wait for jobs; {', '.join(sorted(WORKER_SERVICES))} do")
        host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64] or "host"
        return f"unix:{WorkerName(service, self.places, host).socket(self.sockets_dir)}"


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
