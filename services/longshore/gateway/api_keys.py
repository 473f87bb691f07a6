"""API keys: `ls_<id>_<secret>`. The database has the id and a SHA-256; the key itself is shown once and kept nowhere.

The secret has 256 random bits, so that a plain hash of it is as good as a slow one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, or_, select, update

from longshore.errors import Conflict, NotFound
from longshore.gateway import tables
from longshore.gateway.database import Database
from longshore.gateway.principal import ROLES, Principal, Role

_keys = tables.api_keys
_SHOWN = [column for column in _keys.c if column.name != "sha256"]
_FORM = re.compile(r"ls_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
MAX_KEYS = 1000


@dataclass(frozen=True)
class ApiKey:
    """A key as it is stored, without its hash; times in Unix seconds."""

    id: str
    project: str | None
    role: Role
    name: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    successor_of: str | None

    @property
    def principal(self) -> Principal:
        return Principal(f"key:{self.id}", self.project, self.role)


class ApiKeys:
    """The keys of one database. Every method raises Unavailable while that cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        project: str | None,
        role: Role,
        name: str,
        expires_at: float | None,
        successor_of: str | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key, and the text that callers send. Raises Conflict: there are MAX_KEYS of the project."""
        key_id = secrets.token_hex(6)
        text = f"ls_{key_id}_{secrets.token_urlsafe(32)}"
        key = ApiKey(key_id, project, role, name, time.time(), expires_at, None, successor_of)
        if len(await self.list(project)) >= MAX_KEYS:
            raise Conflict(f"project {project or '*'} has {MAX_KEYS} keys; revoke some")
        async with self._database.connected() as connection:
            await connection.execute(insert(_keys).values(**{**vars(key), "role": role.word}, sha256=_digest(text)))
        return key, text

    async def find(self, text: str) -> ApiKey | None:
        """The key that a text is, if it may be used now."""
        form = _FORM.fullmatch(text)
        if form is None:
            return None
        row = next(iter(await self._database.rows(select(_keys).where(_keys.c.id == form[1]))), None)
        if row is None or not hmac.compare_digest(row["sha256"], _digest(text)):
            return None
        key = _key({name: value for name, value in row.items() if name != "sha256"})
        now = time.time()
        ends = [at for at in (key.expires_at, key.revoked_at) if at is not None]
        return key if all(now < at for at in ends) else None

    async def list(self, project: str | None) -> list[ApiKey]:
        """A project's keys, or with None everybody's, those that were revoked or have expired left out."""
        now = time.time()
        query = select(*_SHOWN).order_by(_keys.c.id).limit(MAX_KEYS)
        for end in (_keys.c.revoked_at, _keys.c.expires_at):
            query = query.where(or_(end.is_(None), end > now))
        if project is not None:
            query = query.where(_keys.c.project == project)
        return [_key(row) for row in await self._database.rows(query)]

    async def get(self, key_id: str, project: str | None) -> ApiKey:
        """A key, with `project` only if it is that project's. Raises NotFound."""
        query = select(*_SHOWN).where(_keys.c.id == key_id)
        if project is not None:
            query = query.where(_keys.c.project == project)
        row = next(iter(await self._database.rows(query)), None)
        if row is None:
            raise NotFound(f"there is no API key {key_id}")
        return _key(row)

    async def revoke(self, key_id: str, at: float) -> None:
        """Ends a key at a time (Unix seconds), unless it ends before."""
        async with self._database.connected() as connection:
            earlier = or_(_keys.c.revoked_at.is_(None), _keys.c.revoked_at > at)
            await connection.execute(update(_keys).where(_keys.c.id == key_id, earlier).values(revoked_at=at))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _key(row: Any) -> ApiKey:
    return ApiKey(**{**row, "role": ROLES[row["role"]]})
