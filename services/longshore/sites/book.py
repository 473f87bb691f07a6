"""Which certificates of sites are good now: a file that the gateway writes and home's gRPC servers read.

It lists those that are good, not those that were revoked: one that is not there is refused, whoever signed it. It is
read again when it changes, so that a revoked site is out within RECHECK_S.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic
import structlog
from pydantic import BaseModel

from longshore.sites.authority import write_private

log = structlog.get_logger()

RECHECK_S = 1.0
_MAX_BYTES = 16 * 1024 * 1024


class GoodCertificate(BaseModel):
    """A certificate of a site, by its serial number in hex digits. `project` None: every project's jobs."""

    serial: str
    site: str
    project: str | None
    # Unix seconds.
    expires_at: float


class _Page(BaseModel):
    # PEM of who signed them.
    authority: str = ""
    certificates: list[GoodCertificate] = []


@dataclass(frozen=True)
class _Read:
    stamp: tuple[int, int, int] | None
    authority: bytes
    good: dict[str, GoodCertificate]


_NOTHING = _Read(None, b"", {})


class SiteBook:
    """One file. While it is not there no site is let in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = _NOTHING
        self._check_at = 0.0

    @property
    def authority(self) -> bytes:
        """PEM of who signs sites' certificates; empty: nobody does yet."""
        self._refresh()
        return self._read.authority

    def find(self, serial: str, site: str) -> GoodCertificate | None:
        """What is known of a certificate, if it is that site's and good now."""
        self._refresh()
        found = self._read.good.get(serial)
        return found if found is not None and found.site == site and time.time() < found.expires_at else None

    def _refresh(self) -> None:
        now = time.monotonic()
        if now < self._check_at:
            return
        self._check_at = now + RECHECK_S
        stamp = self._stamp()
        if stamp == self._read.stamp:
            return
        if stamp is None:
            log.warning("the sites' file is gone: no site is let in", path=str(self._path))
            self._read = _NOTHING
            return
        try:
            with self._path.open("rb") as file:
                page = _Page.model_validate_json(file.read(_MAX_BYTES))
        except (OSError, pydantic.ValidationError) as error:
            # It is replaced as a whole, so this is no half-written one: nobody is let in by what cannot be read.
            log.error("the sites' file cannot be read: no site is let in", path=str(self._path), reason=str(error))
            self._read = _Read(stamp, b"", {})
            return
        good = {item.serial: item for item in page.certificates}
        self._read = _Read(stamp, page.authority.encode(), good)
        log.info("sites read", sites=sorted({item.site for item in page.certificates}))

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def write_book(path: Path, authority: bytes, certificates: Sequence[GoodCertificate]) -> None:
    """Replaces the file as a whole. Raises OSError."""
    page = {"authority": authority.decode(), "certificates": [item.model_dump() for item in certificates]}
    write_private(path, json.dumps(page, indent=1).encode() + b"\n")
