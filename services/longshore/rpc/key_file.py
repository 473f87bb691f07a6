"""API keys: names and SHA-256 digests in a file, read again when it changes.

A line is `NAME DIGEST`, the digest as 64 hex digits; empty lines and those that begin with # say nothing. Two keys of
one person have two names, so that one can go while the other stays. Keys are random and long, so one round of a fast
hash is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from pathlib import Path

import structlog

from longshore.errors import ConfigError

log = structlog.get_logger()

# How long a key that was taken out may still be accepted.
RECHECK_S = 1.0
_MAX_BYTES = 1024 * 1024
_LINE = re.compile(r"([A-Za-z0-9._@-]{1,64})\s+([0-9a-fA-F]{64})")


def digest_line(name: str, key: str) -> str:
    """The line that lets a key in."""
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n"


class KeyFile:
    """The keys of one file."""

    def __init__(self, path: Path, variable: str) -> None:
        """
        Args:
            variable: the setting that `path` came from.

        Raises:
            ConfigError: the file cannot be used.
        """
        self._path = path
        self._where = f"{variable} {path}"
        self._seen = self._stamp()
        self._keys = self._read()
        self._check_at = time.monotonic() + RECHECK_S

    def name_of(self, key: str) -> str | None:
        """The name of whoever sends this key; None: nobody's."""
        self._refresh()
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        # Every key is looked at, and each comparison takes the same time: an answer's pace tells nothing.
        for name, known in self._keys.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now < self._check_at:
            return
        self._check_at = now + RECHECK_S
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return
            self._keys = self._read()
            self._seen = stamp
        except ConfigError as error:
            # Somebody may be in the middle of writing it: the keys that were right stay so.
            log.warning("keys not read again", reason=str(error))
            return
        log.info("keys read", names=sorted(self._keys))

    def _stamp(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise ConfigError(f"{self._where}: {error.strerror}") from None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> dict[str, bytes]:
        try:
            with self._path.open(encoding="utf-8") as file:
                text = file.read(_MAX_BYTES)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._where}: {error}") from None
        keys: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), 1):
            stripped = line.strip()
            if not stripped or stripped.startswith("#"):
                continue
            match = _LINE.fullmatch(stripped)
            # The line itself may be a key that somebody wrote in plain.
            if match is None:
                raise ConfigError(
                    f"{self._where}: line {number} is not a name and the 64 hex digits of a SHA-256 digest"
                )
            if match[1] in keys:
                raise ConfigError(f"{self._where}: line {number}: the name {match[1]} is there twice")
            keys[match[1]] = bytes.fromhex(match[2])
        return keys
