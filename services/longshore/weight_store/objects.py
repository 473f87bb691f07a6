"""The object store: named bytes, written whole or not at all. The only module that knows obstore.

Blocking, because obstore's asyncio calls can abort the interpreter at exit; callers use threads. Knows nothing of
versions. On a local folder every write is on the disk before it returns.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import obstore
import obstore.exceptions
import obstore.store

from longshore.errors import ConfigError, Conflict, NotFound, Unavailable

# Where obstore's local store writes before it renames; a killed process leaves them, and listings skip them.
_STAGED = re.compile(r".+#\d+$")


class StorageFull(Unavailable):
    """There is no room for what was to be written."""


@dataclass(frozen=True)
class StoredObject:
    """One line of a listing."""

    path: str
    size: int
    # Unix seconds.
    modified_at: float


class Objects:
    """One object store. Paths are relative, with / between their parts.

    Every method raises Unavailable when the store does not answer, and StorageFull when it has no room.
    """

    def __init__(self, store: object, root: Path | None = None) -> None:
        self._store = store
        # The folder of a local store, None elsewhere.
        self.root = root

    def put(self, path: str, data: bytes | IO[bytes]) -> None:
        """Writes an object, over the one that is there. A file is read from its present position."""
        with _translated(path):
            obstore.put(self._store, path, data, mode="overwrite")
        self._sync(path)

    def create(self, path: str, data: bytes) -> None:
        """Writes an object that must not exist yet. Raises Conflict when it does."""
        with _translated(path):
            obstore.put(self._store, path, data, mode="create")
        self._sync(path)

    def get(self, path: str) -> bytes:
        """Raises NotFound."""
        with _translated(path):
            return bytes(obstore.get(self._store, path).bytes())

    def size(self, path: str) -> int:
        """Raises NotFound."""
        with _translated(path):
            return int(obstore.head(self._store, path)["size"])

    def read(self, path: str, start: int, length: int) -> bytes:
        """Bytes from `start`, which must be below the size: `length` of them, or fewer at the end. Raises NotFound."""
        with _translated(path):
            return bytes(obstore.get_range(self._store, path, start=start, length=length))

    def folders(self, prefix: str) -> list[str]:
        """Names of what lies directly below a prefix ("" for everything) and has something below itself."""
        with _translated(prefix):
            found = obstore.list_with_delimiter(self._store, prefix or None)
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    def list(self, prefix: str) -> list[StoredObject]:
        """Everything below a prefix, in no order."""
        with _translated(prefix):
            found = obstore.list(self._store, prefix).collect()
        return [StoredObject(item["path"], item["size"], item["last_modified"].timestamp()) for item in found]

    def delete(self, path: str) -> None:
        """Removes an object; one that is not there is removed already."""
        with contextlib.suppress(NotFound), _translated(path):
            obstore.delete(self._store, path)

    def sweep_staged(self, prefix: str, older_than: float) -> None:
        """Removes what killed writes left in a local store, if last written before `older_than` (Unix seconds)."""
        if self.root is None:
            return
        for folder, _, names in os.walk(self.root / prefix):
            for name in filter(_STAGED.match, names):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < older_than:
                        path.unlink()

    def _sync(self, path: str) -> None:
        """Puts a written object, and the folders that lead to it, on the disk."""
        if self.root is None:
            return
        file = self.root / path
        for part in (file, *file.parents):
            descriptor = os.open(part, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if part == self.root:
                return


def open_objects(url: str) -> Objects:
    """Opens a folder, which is made if it is missing, or an object store's URL.

    Raises:
        ConfigError: the folder cannot be made or the URL is not understood.
    """
    try:
        if "://" in url and not url.startswith("file://"):
            return Objects(obstore.store.from_url(url))
        # Resolved: obstore would resolve links and we must find the same files.
        root = Path(url.removeprefix("file://")).resolve()
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Objects(obstore.store.LocalStore(root, automatic_cleanup=True), root)
    except (OSError, ValueError, obstore.exceptions.BaseError) as error:
        raise ConfigError(f"LONGSHORE_STORE_URL {url}: {_first_line(error)}") from None


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"the store has no {path}") from None
    except obstore.exceptions.AlreadyExistsError:
        raise Conflict(f"{path} exists") from None
    except (OSError, obstore.exceptions.BaseError) as error:
        text = _first_line(error)
        if "os error 28" in text or "No space left" in text:
            raise StorageFull(f"no room for {path}") from None
        raise Unavailable(f"{path}: {text}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
