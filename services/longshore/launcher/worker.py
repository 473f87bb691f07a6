"""A worker: a container (or any process) that waits until a gateway gives it processes of its one service to run.

It is a supervisor that is told less than the local one: of a process it takes the name, the settings and the log, and
neither the program nor its arguments. Whoever reaches its socket can have it run its own service, and nothing else.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence

from longshore.errors import Rejected, Unavailable
from longshore.launcher.child import Probe
from longshore.launcher.spec import ProcessSpec, UnitState
from longshore.launcher.supervisor import Supervisor

# What a plan sets: our own settings, and how wide libraries may be.
_SETTING = re.compile(
    r"^(LONGSHORE_[A-Z0-9_]+|OMP_NUM_THREADS|MKL_NUM_THREADS|OPENBLAS_NUM_THREADS|NUMEXPR_NUM_THREADS"
    r"|TOKENIZERS_PARALLELISM)$"
)


def foreign(spec: ProcessSpec) -> list[str]:
    """Variables that a worker does not let a gateway set."""
    return sorted(variable for variable in spec.env if not _SETTING.match(variable))


class Worker(Supervisor):
    """Runs single processes of one service, each a unit of its own named JOB/PROCESS."""

    def __init__(self, service: str, places: int, probe: Probe) -> None:
        super().__init__(probe)
        self.service = service
        self.places = places

    async def apply(self, name: str, specs: Sequence[ProcessSpec]) -> None:
        """Starts the one process of a unit.

        Raises:
            Rejected: it is not one process of this worker's service, or has variables that are no settings.
            Unavailable: every place is taken.
            Conflict: as a supervisor.
        """
        if len(specs) != 1 or specs[0].service != self.service:
            wanted = ", ".join(f"{spec.name} ({spec.service})" for spec in specs)
            raise Rejected("service", f"this worker runs one {self.service} a unit, not {wanted or 'nothing'}")
        spec = specs[0]
        strange = foreign(spec)
        if strange:
            raise Rejected("environment", f"{spec.name}: {', '.join(strange)} is no setting of a process")
        if name not in self._units and self._running() >= self.places:
            raise Unavailable(f"this worker's places ({self.places}) are taken")
        argv = (sys.executable, "-m", "longshore", "serve", self.service)
        await super().apply(name, [dataclasses.replace(spec, argv=argv)])

    def metrics_addresses(self) -> dict[str, str]:
        """JOB/PROCESS -> host:port of its /metrics, of every process that runs. May be called from any thread."""
        return {
            name: child.spec.env["LONGSHORE_METRICS_LISTEN"]
            for name, unit in tuple(self._units.items())
            if unit.state is UnitState.RUNNING
            for child in tuple(unit.children)
            if "LONGSHORE_METRICS_LISTEN" in child.spec.env
        }

    def _running(self) -> int:
        return sum(unit.state is UnitState.RUNNING for unit in self._units.values())
