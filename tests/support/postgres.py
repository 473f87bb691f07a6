"""A Postgres server of our own on a Unix socket: initialised, started, and ended with the block.

Used where the machine has Postgres's own binaries; Debian keeps them off the path.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 60.0
USER = "longshore"


def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`; None where there is none."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return folders[-1].parent if folders else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Yields the URL of an empty database `postgres`; more databases can be made in it."""
    folder = binaries()
    assert folder is not None
    # A Unix socket's path is limited to about 100 bytes: pytest's own folders can be longer.
    with tempfile.TemporaryDirectory(prefix="ls-pg-") as place:
        owner = _unprivileged()
        if owner is not None:
            shutil.chown(place, owner)
        data = f"{place}/data"
        subprocess.run(
            [folder / "initdb", "-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            user=owner,
            cwd=place,
        )
        # Nothing here has to survive this machine.
        quick = ["-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off"]
        with Path(place, "log").open("ab") as log:
            server = subprocess.Popen(
                [folder / "postgres", "-D", data, "-k", place, "-c", "listen_addresses=", *quick],
                stdout=log,
                stderr=log,
                user=owner,
                cwd=place,
            )
        try:
            _await(folder, place, server)
            yield f"postgresql+asyncpg://{USER}@/postgres?host={place}"
        finally:
            # "Fast" shutdown: clients are cut off.
            server.send_signal(2)
            server.wait(START_S)


def _await(folder: Path, place: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while subprocess.run([folder / "pg_isready", "-q", "-h", place], check=False).returncode:
        assert server.poll() is None, Path(place, "log").read_text()
        assert time.monotonic() < deadline, "Postgres did not start"
        time.sleep(0.05)


def _unprivileged() -> str | None:
    """Postgres refuses to run as root."""
    if os.geteuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"
