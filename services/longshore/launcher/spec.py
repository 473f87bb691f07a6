"""What the launcher is told to run and what it says of it: plain values, no protobuf.

A port that the launcher shall choose is written `${PORT:name}` in `env` and in `ready.address`; one name means one
port within a unit, reserved for the unit's life, so that a process that is started again finds its port free.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path


class ReadyKind(enum.Enum):
    """How readiness is asked for."""

    # grpc.health.v1 with the empty service name.
    GRPC = "grpc"
    # PING on a Redis URL.
    REDIS = "redis"


@dataclass(frozen=True)
class Ready:
    """Example: Ready(ReadyKind.GRPC, "127.0.0.1:${PORT:actor-0.grpc}")"""

    kind: ReadyKind
    address: str


@dataclass(frozen=True)
class ProcessSpec:
    """One process to run.

    Example: ProcessSpec("actor-0", "actor", ("python", "-m", "longshore", "serve", "actor"), {...}, log, ready)
    """

    name: str
    service: str
    argv: tuple[str, ...]
    # Added to the launcher's own environment.
    env: dict[str, str]
    log_path: Path
    ready: Ready
    # Its exit with 0 ends the unit as succeeded.
    completes_unit: bool = False


class ProcessState(enum.Enum):
    """Where one process is in its life."""

    STARTING = "starting"
    READY = "ready"
    # Died; a restart is due.
    BACKOFF = "backoff"
    EXITED = "exited"
    GAVE_UP = "gave_up"


class UnitState(enum.Enum):
    """Where a unit (a job, or the stack) is in its life."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True)
class ProcessStatus:
    """What is known of one process. `exit_code` is negative for a signal, None while the first life lasts."""

    name: str
    state: ProcessState
    pid: int
    restarts: int
    exit_code: int | None
    log_path: str


@dataclass(frozen=True)
class UnitStatus:
    """What is known of one unit; `message` is one sentence with the log's path when it failed."""

    unit: str
    state: UnitState
    message: str = ""
    processes: tuple[ProcessStatus, ...] = field(default=())

    @property
    def ready(self) -> bool:
        """Whether every process is ready."""
        return all(process.state is ProcessState.READY for process in self.processes)
