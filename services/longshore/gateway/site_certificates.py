"""Which rollout sites have joined, by their certificates: the gateway's own record, in its database."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update

from longshore.errors import Conflict, NotFound
from longshore.gateway import tables
from longshore.gateway.database import Database

_table = tables.site_certificates
# A site that renews has its new certificate and those that its relays may still show; the oldest end first.
MAX_GOOD = 4
MAX_SITES = 1000
# Certificates that have ended are told of for this long.
_KEPT_S = 90 * 86_400.0


@dataclass(frozen=True)
class SiteCertificate:
    """Times in Unix seconds; `project` None: the site may take part in every project's jobs."""

    serial: str
    site: str
    project: str | None
    broker_sha256: str
    key_id: str
    issued_at: float
    expires_at: float
    revoked_at: float | None

    def is_good(self, now: float) -> bool:
        return self.revoked_at is None and now < self.expires_at


class SiteCertificates:
    """The certificates of one database. Every method raises Unavailable while that cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def good(self) -> list[SiteCertificate]:
        """Every certificate that is good now, newest first."""
        now = time.time()
        query = select(_table).where(_table.c.revoked_at.is_(None), _table.c.expires_at > now)
        rows = await self._database.rows(query.order_by(_table.c.issued_at.desc()))
        return [SiteCertificate(**row) for row in rows]

    async def newest(self, project: str | None) -> list[SiteCertificate]:
        """Each site's newest, by name; with `project` those that may take part in its jobs alone."""
        query = select(_table).order_by(_table.c.site, _table.c.issued_at.desc())
        if project is not None:
            query = query.where(_table.c.project == project)
        found: dict[str, SiteCertificate] = {}
        for row in await self._database.rows(query):
            found.setdefault(row["site"], SiteCertificate(**row))
        return list(found.values())

    async def current(self, site: str) -> SiteCertificate:
        """A site's newest certificate that is good. Raises NotFound."""
        query = select(_table).where(_table.c.site == site).order_by(_table.c.issued_at.desc())
        now = time.time()
        for row in await self._database.rows(query):
            if (found := SiteCertificate(**row)).is_good(now):
                return found
        raise NotFound(f"site {site} has no credential that is good: `longshore site join {site}` makes one")

    async def join(self, certificate: SiteCertificate) -> None:
        """Adds a site's first certificate. Raises Conflict: it has one that is good, or there are too many sites."""
        now = time.time()
        async with self._database.connected() as connection:
            old = select(_table.c.site).where(_table.c.revoked_at.is_(None), _table.c.expires_at > now).distinct()
            sites = {row[0] for row in await connection.execute(old)}
            if certificate.site in sites:
                raise Conflict(
                    f"site {certificate.site} has joined already: renew its credential, or revoke it and join it anew"
                )
            if len(sites) >= MAX_SITES:
                raise Conflict(f"{MAX_SITES} sites have joined; revoke some")
            await connection.execute(delete(_table).where(_table.c.expires_at < now - _KEPT_S))
            await connection.execute(insert(_table).values(**vars(certificate)))

    async def renew(self, certificate: SiteCertificate) -> None:
        """Adds a certificate beside a site's earlier ones, of which the oldest end. Raises NotFound: none is good."""
        now = time.time()
        async with self._database.connected() as connection:
            mine = select(_table.c.serial).where(
                _table.c.site == certificate.site, _table.c.revoked_at.is_(None), _table.c.expires_at > now
            )
            found = await connection.execute(mine.order_by(_table.c.issued_at.desc()))
            serials: Sequence[str] = [row[0] for row in found]
            if not serials:
                raise NotFound(f"site {certificate.site} has no credential that is good")
            ended = _table.c.serial.in_(serials[MAX_GOOD - 1 :])
            await connection.execute(update(_table).where(ended).values(revoked_at=now))
            await connection.execute(insert(_table).values(**vars(certificate)))

    async def revoke(self, site: str) -> SiteCertificate:
        """Ends every certificate of a site; can be repeated. Returns its newest. Raises NotFound: it never joined."""
        async with self._database.connected() as connection:
            query = select(_table).where(_table.c.site == site).order_by(_table.c.issued_at.desc()).limit(1)
            row = (await connection.execute(query)).mappings().first()
            if row is None:
                raise NotFound(f"there is no site {site}: none of that name has joined")
            mine = (_table.c.site == site, _table.c.revoked_at.is_(None))
            await connection.execute(update(_table).where(*mine).values(revoked_at=time.time()))
        return SiteCertificate(**row)
