"""Which launcher an address means."""

from __future__ import annotations

from pathlib import Path

from longshore.launcher.client import SupervisorClient
from longshore.launcher.fleet import Fleet

WORKERS = "workers:"


def connect_launcher(address: str) -> SupervisorClient | Fleet:
    """`workers:FOLDER`: the workers whose sockets are in the folder; else the supervisor at that address."""
    if address.startswith(WORKERS):
        return Fleet(Path(address.removeprefix(WORKERS)), SupervisorClient)
    return SupervisorClient(address)
