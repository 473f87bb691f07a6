"""What a worker is told at its start, and where its socket is. Imports little: a health check asks for it too."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from pydantic import Field

from longshore.errors import ConfigError
from longshore.launcher.worker_sockets import WORKER_SERVICES, WorkerName
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
