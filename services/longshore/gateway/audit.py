"""The audit log: every request of a known caller that was to change something, and how it was answered."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import insert, select

from longshore.gateway import tables
from longshore.gateway.database import Database

_audit = tables.audit
_MAX_PATH = 512


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
