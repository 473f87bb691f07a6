"""The audit log: every request of a known caller that was to change something, and how it was answered."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import structlog
from sqlalchemy import delete, insert, select

from longshore.errors import Unavailable
from longshore.gateway import tables
from longshore.gateway.database import Database
from longshore.gateway.store import wait_for_any

_audit = tables.audit
_MAX_PATH = 512
_PRUNE_EVERY_S = 3600.0
# Of one transaction: others write too.
_PRUNED_AT_ONCE = 1000
_DAY_S = 86400.0

log = structlog.get_logger()


@dataclass(frozen=True)
class AuditRow:
    """One request; `time` in Unix seconds. `project` is that of the job, or else the caller's; None: every project."""

    id: int
    time: float
    project: str | None
    principal: str
    method: str
    path: str
    status: int
    request_id: str


class AuditLog:
    """Every method raises Unavailable while the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(
        self, project: str | None, principal: str, method: str, path: str, status: int, request_id: str
    ) -> None:
        row = {"project": project, "principal": principal, "method": method, "path": path[:_MAX_PATH]}
        async with self._database.connected() as connection:
            await connection.execute(
                insert(_audit).values(**row, time=time.time(), status=status, request_id=request_id)
            )

    async def newest(self, limit: int, project: str | None, before: int | None) -> list[AuditRow]:
        """Entries, newest first; with `project` only those of its jobs and its own callers."""
        query = select(_audit).order_by(_audit.c.id.desc()).limit(limit)
        if project is not None:
            query = query.where(_audit.c.project == project)
        if before is not None:
            query = query.where(_audit.c.id < before)
        return [AuditRow(**row) for row in await self._database.rows(query)]

    async def prune(self, before: float) -> int:
        """Deletes entries older than `before`, Unix seconds, and returns how many there were."""
        count = 0
        while True:
            oldest = select(_audit.c.id).order_by(_audit.c.id).limit(_PRUNED_AT_ONCE).scalar_subquery()
            async with self._database.connected() as connection:
                done = await connection.execute(delete(_audit).where(_audit.c.id.in_(oldest), _audit.c.time < before))
            count += done.rowcount
            if done.rowcount < _PRUNED_AT_ONCE:
                return count

    async def keep(self, days: int, stop: asyncio.Event) -> None:
        """Prunes every hour what is older than `days`, until `stop`."""
        while not stop.is_set():
            try:
                pruned = await self.prune(time.time() - days * _DAY_S)
            except Unavailable as error:
                log.warning("audit log not pruned", reason=str(error))
            else:
                if pruned:
                    log.info("audit log pruned", entries=pruned, older_than_days=days)
            await wait_for_any(stop, timeout=_PRUNE_EVERY_S)
