"""Where workers and the processes that they run are reached: Unix sockets in one folder that containers share.

    SERVICE.PLACES.HOST.worker      a worker, which says by its name what it runs and how many of it
    HASH-PROCESS.sock               a job's process, the same wherever it runs

A socket's path is limited to 107 bytes: a job's id is hashed, and the folder should be short.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from longshore.launcher.ports import LOOPBACK
from longshore.launcher.spec import ProcessSpec, Ready

# What a gateway may have a worker run.
WORKER_SERVICES = frozenset({"actor", "generator", "learner", "verifier"})
_WORKER = re.compile(r"^([a-z]+)\.([1-9][0-9]{0,2})\.([A-Za-z0-9_-]{1,64})\.worker$")
_GRPC = re.compile(re.escape(LOOPBACK) + r":\$\{PORT:([A-Za-z0-9_.-]+)\.grpc\}")


@dataclass(frozen=True)
class WorkerName:
    """Example: WorkerName("actor", 4, "3f2a90c1b7de")"""

    service: str
    places: int
    host: str

    def socket(self, folder: Path) -> Path:
        return folder / f"{self.service}.{self.places}.{self.host}.worker"


def find_workers(folder: Path) -> dict[Path, WorkerName]:
    """The workers that have a socket in the folder, dead ones too. Raises OSError when it cannot be read."""
    found = {}
    for path in sorted(folder.iterdir()):
        named = _WORKER.match(path.name)
        if named and named[1] in WORKER_SERVICES:
            found[path] = WorkerName(named[1], int(named[2]), named[3])
    return found


def on_sockets(spec: ProcessSpec, unit: str, folder: Path) -> ProcessSpec:
    """The process as a worker gets it: where the plan leaves a gRPC port to the launcher, a socket stands.

    Ports of metrics stay: they are nobody's but the worker's.
    """
    job = hashlib.sha256(unit.encode()).hexdigest()[:8]

    def placed(text: str) -> str:
        return _GRPC.sub(lambda name: f"unix:{folder / f'{job}-{name[1]}.sock'}", text)

    return dataclasses.replace(
        spec,
        env={name: placed(value) for name, value in spec.env.items()},
        ready=Ready(spec.ready.kind, placed(spec.ready.address)),
    )
