from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from longshore.errors import Conflict
from longshore.launcher import state_dir as state


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_one_stack_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with state.locked(folder):
        assert mode(folder) == 0o700
        assert state.holder(folder) == os.getpid()
        with (
            pytest.raises(Conflict, match=rf"running already.*process {os.getpid()}.*longshore down"),
            state.locked(folder),
        ):
            pass
    assert state.holder(folder) is None
    with state.locked(folder):
        pass


KILLED = """
import os, sys
from pathlib import Path
from longshore.launcher import state_dir as state

folder = Path(sys.argv[1])
up = state.UpFile("http://127.0.0.1:1", os.getpid(), "0")
with state.locked(folder), state.api_key(folder), state.announced(folder, up):
    os.kill(os.getpid(), 9)
"""


def test_a_killed_stack_leaves_nothing_that_is_believed(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -9
    assert (tmp_path / "up.json").exists()
    assert state.holder(tmp_path) is None
    assert state.read_up(tmp_path) is None
    with state.locked(tmp_path), state.api_key(tmp_path):
        pass


def test_the_key_and_the_address_are_private_and_go_with_the_stack(tmp_path: Path) -> None:
    up = state.UpFile("http://127.0.0.1:1", os.getpid(), "0.1.0")
    with state.locked(tmp_path), state.api_key(tmp_path) as key, state.announced(tmp_path, up):
        assert len(key) >= 40
        assert state.read_api_key(tmp_path) == key
        assert state.read_up(tmp_path) == up
        assert {mode(tmp_path / name) for name in ("api.key", "up.json")} == {0o600}
    assert not (tmp_path / "api.key").exists()
    assert not (tmp_path / "up.json").exists()


@pytest.mark.parametrize("name", ["short", "a folder with spaces", "x" * 120])
def test_sockets_lie_where_a_socket_can(name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="ls-", dir="/tmp") as parent:
        folder = Path(parent) / name
        folder.mkdir()
        with state.socket_dir(folder) as sockets:
            assert mode(sockets) == 0o700
            assert (sockets == folder / "sockets") == (name == "short")
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(sockets / "supervisor.sock"))
        assert sockets.exists() == (name == "short")
