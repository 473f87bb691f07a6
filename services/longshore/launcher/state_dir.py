"""The state directory of a stack: who owns it, where its sockets are, and how others find the stack.

lock         held (flock) by the stack's process; its text is that process's pid
up.json      url, pid and version while the stack is up
api.key      the key of the REST API
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from longshore.errors import Conflict

# sun_path holds 108 bytes with its final zero; the longest of our socket names is 16 bytes with its slash.
_MAX_SOCKET_DIR = 107 - 16
_PLAIN = re.compile(r"^[A-Za-z0-9_./-]+$")


@dataclass(frozen=True)
class UpFile:
    """What up.json holds."""

    url: str
    pid: int
    version: str


def default_state_dir() -> Path:
    """LONGSHORE_HOME, else .longshore in the current directory."""
    return Path(os.environ.get("LONGSHORE_HOME") or ".longshore").resolve()


def default_runs_dir() -> Path:
    """LONGSHORE_RUNS, else runs in the current directory."""
    return Path(os.environ.get("LONGSHORE_RUNS") or "runs").resolve()


@contextlib.contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Owns the state directory, which is made if need be. The lock ends with the process, however that ends.

    Raises:
        Conflict: another stack owns it.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    state_dir.chmod(0o700)
    with (state_dir / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"a stack is running already in {state_dir} (process {holder(state_dir) or 'unknown'}): give it jobs "
                "with `longshore submit`, or stop it with `longshore down`"
            ) from None
        # What a killed stack left behind must not be taken for ours.
        for name in ("up.json", "api.key"):
            (state_dir / name).unlink(missing_ok=True)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
        lock.truncate(0)


def holder(state_dir: Path) -> int | None:
    """Pid of the process that owns the directory; None when nobody does. Raises OSError if it cannot be read."""
    try:
        with (state_dir / "lock").open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = lock.read().strip()
                return int(text) if text.isdigit() else None
    except FileNotFoundError:
        return None
    return None


@contextlib.contextmanager
def socket_dir(state_dir: Path) -> Iterator[Path]:
    """A private folder for Unix sockets: the state directory's own, or a short one in the system's temporary folder
    when that path is too long for a socket or has characters that socket URLs would have to escape."""
    inside = state_dir / "sockets"
    if len(os.fsencode(inside)) <= _MAX_SOCKET_DIR and _PLAIN.match(str(inside)):
        inside.mkdir(mode=0o700, exist_ok=True)
        inside.chmod(0o700)
        yield inside
        return
    short = Path(tempfile.mkdtemp(prefix="longshore-"))
    try:
        yield short
    finally:
        shutil.rmtree(short, ignore_errors=True)


@contextlib.contextmanager
def api_key(state_dir: Path) -> Iterator[str]:
    """A new random key of the REST API, in api.key while the block runs."""
    key = secrets.token_urlsafe(32)
    path = state_dir / "api.key"
    write_private(path, key + "\n")
    try:
        yield key
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def announced(state_dir: Path, up: UpFile) -> Iterator[None]:
    """Says in up.json that the stack is up, while the block runs."""
    path = state_dir / "up.json"
    write_private(path, json.dumps(asdict(up)) + "\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_up(state_dir: Path) -> UpFile | None:
    """What up.json says of a stack that lives; None when there is none, whatever a killed one left behind."""
    if holder(state_dir) is None:
        return None
    try:
        up = json.loads((state_dir / "up.json").read_text(encoding="utf-8"))
        return UpFile(str(up["url"]), int(up["pid"]), str(up["version"]))
    except (OSError, ValueError, KeyError):
        return None


def read_api_key(state_dir: Path) -> str:
    """Raises OSError when there is none."""
    return (state_dir / "api.key").read_text(encoding="utf-8").strip()


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner may read, whole or not at all."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    part.replace(path)
