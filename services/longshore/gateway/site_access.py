"""Lets rollout sites in and out: signs their certificates, and keeps weight store and broker told which are good.

| loop  | consumes                   | produces                            | waits for                        |
| `run` | certificates that are good | the sites' file, the broker's users | KEEP_S; the database, the broker |

The database says who may come in. What weight store and broker know of it is made to match, again and again: a broker
that restarts has forgotten its users.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit, urlunsplit

import structlog

from longshore.errors import ConfigError, Conflict, LongshoreError, NotFound, Unavailable
from longshore.gateway.api_keys import ApiKeys
from longshore.gateway.principal import Role
from longshore.gateway.site_certificates import SiteCertificate, SiteCertificates
from longshore.rollout_queue.site_rules import user_name
from longshore.rpc.channel import is_local
from longshore.rpc.process import wait_or_stop
from longshore.sites.authority import Authority
from longshore.sites.book import GoodCertificate, write_book
from longshore.sites.certificates import read_certificate

log = structlog.get_logger()

KEEP_S = 5.0
Known = dict[str, tuple[str | None, str]]


class Users(Protocol):
    """The broker's users, as rollout_queue.site_users has them."""

    async def check_closed(self) -> None: ...
    async def keep(self, sites: Known) -> None: ...


@dataclass(frozen=True)
class SiteSettings:
    """Where sites reach this home, and what they know it by.

    `authority_of_home`: PEM of who signs the certificates of weight store and broker.
    """

    weights: str
    broker_url: str
    gateway: str
    authority_of_home: bytes
    authority_dir: Path
    book: Path

    def check(self) -> None:
        """Raises ConfigError: an address cannot be a site's, or would have secrets go over a network in the clear."""
        web = urlsplit(self.gateway)
        if web.scheme != "https" and not (web.scheme == "http" and is_local(f"{web.hostname}:{web.port or 80}")):
            raise ConfigError(f"LONGSHORE_SITES_GATEWAY {self.gateway}: must be https://")
        url = urlsplit(self.broker_url)
        if url.username or url.password:
            raise ConfigError("LONGSHORE_SITES_BROKER_URL: leave name and password out; each site gets its own")
        if url.scheme == "unix" or (url.scheme == "redis" and is_local(f"{url.hostname}:{url.port or 6379}")):
            return
        if url.scheme != "rediss" or not url.hostname:
            raise ConfigError(f"LONGSHORE_SITES_BROKER_URL {self.broker_url}: must be rediss://host:port")

    def broker_url_of(self, site: str, password: str) -> str:
        """The broker's URL with a site's name and password."""
        url = urlsplit(self.broker_url)
        return urlunsplit(url._replace(netloc=f"{user_name(site)}:{quote(password, safe='')}@{url.netloc}"))


@dataclass(frozen=True)
class Joined:
    """What a site is told when it joins or renews. The secrets are nowhere else; None: as they were."""

    record: SiteCertificate
    certificate: bytes
    broker_url: str | None
    api_key: str | None


class SiteAccess:
    """One home's sites. Methods raise Unavailable while the database or the broker is away."""

    def __init__(self, settings: SiteSettings | None, records: SiteCertificates, keys: ApiKeys, users: Users) -> None:
        """
        Args:
            settings: None: this home takes no sites.
        """
        if settings is not None:
            settings.check()
        self._settings = settings
        self.records = records
        self._keys = keys
        self._users = users
        self._authority: Authority | None = None
        self._written: list[GoodCertificate] | None = None
        self._turn = asyncio.Lock()
        self._joining = asyncio.Lock()

    @property
    def settings(self) -> SiteSettings:
        """Raises Conflict: this home takes no sites."""
        if self._settings is None:
            raise Conflict(
                "this home takes no rollout sites: set LONGSHORE_SITES_WEIGHTS, LONGSHORE_SITES_BROKER_URL, "
                "LONGSHORE_SITES_GATEWAY and LONGSHORE_TLS_CA of the gateway"
            )
        return self._settings

    async def run(self, stop: asyncio.Event) -> None:
        """Keeps everybody told until `stop`; what cannot be done now is tried again. Jobs do not wait for it."""
        told = ""
        while self._settings is not None and not stop.is_set():
            try:
                await self.tell()
                told = ""
            except LongshoreError as error:
                if told != str(error):
                    log.warning("sites not told", reason=str(error))
                told = str(error)
            await wait_or_stop(stop, KEEP_S)
        await stop.wait()

    async def tell(self) -> None:
        """Makes the sites' file and the broker's users match the database."""
        settings = self.settings
        async with self._turn:
            good = await self.records.good()
            authority = await self._opened()
            page = [GoodCertificate.model_validate(item, from_attributes=True) for item in good]
            if page != self._written:
                try:
                    await asyncio.to_thread(write_book, settings.book, authority.pem, page)
                except OSError as error:
                    raise Unavailable(f"sites' file {settings.book}: {error.strerror}") from None
                self._written = page
            await self._users.keep(_known(good))

    async def join(self, site: str, project: str | None, request_pem: bytes, days: float) -> Joined:
        """Lets a site in.

        Raises:
            Conflict: it has joined already, or nobody can be kept out of the broker. Rejected: the request is unsound.
        """
        async with self._joining:
            return await self._join(self.settings, site, project, request_pem, days)

    async def _join(
        self, settings: SiteSettings, site: str, project: str | None, request_pem: bytes, days: float
    ) -> Joined:
        await self._users.check_closed()
        certificate = (await self._opened()).issue_site(site, request_pem, days)
        password = secrets.token_urlsafe(32)
        digest = hashlib.sha256(password.encode()).hexdigest()
        key, key_text = await self._keys.create(project, Role.SITE, f"site {site}", None)
        record = _record(certificate, site, project, digest, key.id)
        try:
            await self.records.join(record)
        except LongshoreError:
            await self._keys.revoke(key.id, time.time())
            raise
        try:
            await self.tell()
        except LongshoreError:
            # Nobody was told the secrets: the name is free again.
            await self.revoke_record(site)
            raise
        return Joined(record, certificate, settings.broker_url_of(site, password), key_text)

    async def renew(self, site: str, request_pem: bytes) -> Joined:
        """Gives a site another certificate, for as long as it had; the one that it has stays good for its time.

        Raises:
            NotFound: it has none that is good. Rejected: the request is unsound.
        """
        old = await self.records.current(site)
        life = (old.expires_at - old.issued_at) / 86_400.0
        certificate = (await self._opened()).issue_site(site, request_pem, life)
        record = _record(certificate, site, old.project, old.broker_sha256, old.key_id)
        await self.records.renew(record)
        await self.tell()
        return Joined(record, certificate, None, None)

    async def revoke(self, site: str) -> None:
        """Puts a site out: its certificates, its user at the broker with all connections, its API key. Repeatable.

        Raises:
            NotFound: it never joined. Unavailable: some of it is still to be done, and will be.
        """
        await self.revoke_record(site)
        await self.tell()

    async def revoke_record(self, site: str) -> None:
        """Revokes in the database alone."""
        newest = await self.records.revoke(site)
        await self._keys.revoke(newest.key_id, time.time())

    async def site_of_key(self, key_id: str) -> str:
        """The site that an API key is for. Raises NotFound."""
        for record in await self.records.good():
            if record.key_id == key_id:
                return record.site
        raise NotFound("this key is no site's that has a credential which is good")

    async def _opened(self) -> Authority:
        if self._authority is None:
            self._authority = await asyncio.to_thread(Authority.open, self.settings.authority_dir)
        return self._authority


def _known(good: Sequence[SiteCertificate]) -> Known:
    """By site, of its newest certificate."""
    known: Known = {}
    for item in good:
        known.setdefault(item.site, (item.project, item.broker_sha256))
    return known


def _record(certificate: bytes, site: str, project: str | None, broker_sha256: str, key_id: str) -> SiteCertificate:
    certified = read_certificate(certificate)
    return SiteCertificate(
        certified.serial, site, project, broker_sha256, key_id, time.time(), certified.expires_at, None
    )
