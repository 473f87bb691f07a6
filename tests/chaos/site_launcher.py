"""The supervisor of a rollout site, in a process of its own: `python -m chaos.site_launcher SOCKET`.

The launcher's own Supervisor behind its own service; what it is to run, it is told through the socket.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from longshore.launcher.probe import probe
from longshore.launcher.service import SupervisorService
from longshore.launcher.supervisor import Supervisor
from longshore.proto.v1.supervisor_pb2_grpc import add_SupervisorServiceServicer_to_server
from longshore.rpc.server import RpcServer


async def run(socket: Path) -> None:
    """Until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    supervisor = Supervisor(probe)
    server = RpcServer(f"unix:{socket}")
    add_SupervisorServiceServicer_to_server(SupervisorService(supervisor), server.server)
    await server.start()
    await stop.wait()
    await supervisor.close("")
    await server.drain(0.0)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
