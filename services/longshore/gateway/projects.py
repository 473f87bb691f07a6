"""Projects' quotas in SQL. A project without a row has no limits of its own."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from longshore.gateway import tables
from longshore.gateway.database import Database
from longshore.gateway.places import Limits

_projects = tables.projects


class Projects:
    """Every method raises Unavailable while the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def quotas(self) -> dict[str, Limits]:
        """By project."""
        rows = await self._database.rows(select(_projects))
        return {row["name"]: Limits(row["max_jobs"], row["max_generators"], row["max_gpus"]) for row in rows}

    async def set_quotas(self, project: str, limits: Limits) -> None:
        """From now on; jobs that have a place keep it."""
        values = {"max_jobs": limits.jobs, "max_generators": limits.generators, "max_gpus": limits.gpus}
        insert = sqlite.insert if self._database.dialect == "sqlite" else postgresql.insert
        row = insert(_projects).values(name=project, **values)
        async with self._database.connected() as connection:
            await connection.execute(row.on_conflict_do_update(index_elements=["name"], set_=values))
