"""Payloads too large for the broker, in object storage: a folder, or a bucket. Knows paths and bytes, nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

import obstore
import obstore.exceptions
from obstore.store import LocalStore, ObjectStore, from_url

from longshore.errors import ConfigError, NotFound, Rejected, Unavailable


class Blobs:
    """Objects by path under one URL. Every method raises Unavailable when the storage fails."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @staticmethod
    def open(url: str) -> Blobs:
        """file:///folder (made if need be), or s3://bucket/prefix with credentials from the environment.

        Raises:
            ConfigError: the URL cannot be used.
        """
        try:
            if url.startswith("file://"):
                return Blobs(LocalStore(Path(url.removeprefix("file://")), mkdir=True))
            return Blobs(from_url(url))
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise ConfigError(f"blobs URL {url!r}: {error}") from None

    async def put(self, path: str, data: bytes) -> None:
        """Writes an object whole, in place of one of that name."""
        # obstore's own asyncio calls can outlive the loop; its synchronous ones in a thread cannot.
        await asyncio.to_thread(self._put, path, data)

    async def get(self, path: str, max_bytes: int) -> bytes:
        """An object whole.

        Raises:
            NotFound: there is none.
            Rejected: `oversized`.
        """
        return await asyncio.to_thread(self._get, path, max_bytes)

    async def delete(self, paths: Sequence[str]) -> None:
        """Removes objects; those that are not there are passed over."""
        await asyncio.to_thread(self._delete, list(paths))

    def _put(self, path: str, data: bytes) -> None:
        try:
            obstore.put(self._store, path, data)
        except (obstore.exceptions.BaseError, OSError) as error:
            raise Unavailable(f"blob {path}: {error}") from error

    def _get(self, path: str, max_bytes: int) -> bytes:
        try:
            found = obstore.get(self._store, path)
            if found.meta["size"] > max_bytes:
                raise Rejected("oversized", f"blob {path} has {found.meta['size']} bytes, at most {max_bytes} allowed")
            return bytes(found.bytes())
        except (obstore.exceptions.NotFoundError, FileNotFoundError):
            raise NotFound(f"there is no blob {path}") from None
        except (obstore.exceptions.BaseError, OSError) as error:
            raise Unavailable(f"blob {path}: {error}") from error

    def _delete(self, paths: list[str]) -> None:
        try:
            with contextlib.suppress(obstore.exceptions.NotFoundError, FileNotFoundError):
                obstore.delete(self._store, paths)
        except (obstore.exceptions.BaseError, OSError) as error:
            raise Unavailable(f"blobs: {error}") from error
