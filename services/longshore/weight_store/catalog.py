"""What one job has on hand, in memory: its versions, and the encodings of each.

The store keeps it in step with what it writes and removes, so that planning a path lists no object store. Thread-safe.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from pathlib import PurePosixPath

import structlog

from longshore.errors import IntegrityError, NotFound
from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store import layout
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import Objects
from longshore.weight_store.records import Records

log = structlog.get_logger()


class Catalog:
    """Versions that exist, each with its encodings by their SHA-256. Encodings of others are never listed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[VersionKey, dict[bytes, weights_pb2.Encoding]] = {}

    @staticmethod
    def load(objects: Objects, job: JobRef) -> Catalog:
        """Reads what the store holds. A record that is damaged is logged and left out. Raises Unavailable."""
        records = Records(objects)
        catalog = Catalog()
        encodings: list[tuple[VersionKey, str]] = []
        for item in objects.list(f"{layout.job_prefix(job)}/versions"):
            key = layout.version_of(job, item.path)
            if key is None:
                continue
            if item.path.endswith("/manifest"):
                catalog.add_version(key)
            else:
                encodings.append((key, item.path))
        for key, path in encodings:
            if not catalog.has(key):
                continue
            with contextlib.suppress(NotFound):
                try:
                    catalog.add(key, records.encoding(path))
                except IntegrityError as error:
                    log.warning("an encoding is left out", path=path, reason=str(error))
        return catalog

    def has(self, key: VersionKey) -> bool:
        with self._lock:
            return key in self._versions

    def numbers(self, weight_set: int) -> list[int]:
        """Versions of a weight set, newest first."""
        with self._lock:
            found = [key.version for key in self._versions if key.weight_set == weight_set]
        return sorted(found, reverse=True)

    def of(self, key: VersionKey) -> list[weights_pb2.Encoding]:
        """A version's encodings; none for a version that does not exist."""
        with self._lock:
            return list(self._versions.get(key, {}).values())

    def encodings(self, weight_set: int) -> dict[int, list[weights_pb2.Encoding]]:
        """The encodings of every version of a weight set."""
        with self._lock:
            return {
                key.version: list(items.values())
                for key, items in self._versions.items()
                if key.weight_set == weight_set
            }

    def all(self) -> dict[VersionKey, list[weights_pb2.Encoding]]:
        """The encodings of every version."""
        with self._lock:
            return {key: list(items.values()) for key, items in self._versions.items()}

    def add_version(self, key: VersionKey) -> None:
        with self._lock:
            self._versions.setdefault(key, {})

    def add(self, key: VersionKey, encoding: weights_pb2.Encoding) -> None:
        """Adds an encoding of a version that exists."""
        with self._lock:
            self._versions[key][encoding.sha256] = encoding

    def forget(self, job: JobRef, paths: Iterable[str]) -> None:
        """Takes out what was removed from the store."""
        with self._lock:
            for path in paths:
                key = layout.version_of(job, path)
                if key is None:
                    continue
                if path.endswith("/manifest"):
                    self._versions.pop(key, None)
                else:
                    self._versions.get(key, {}).pop(bytes.fromhex(PurePosixPath(path).name), None)
