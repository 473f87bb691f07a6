"""Folders of scoring processes: removed after use, and after a verifier that was killed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from longshore.verifier.folders import WorkFolder, sweep

LEAVE_BEHIND = (
    "import os, signal; from longshore.verifier.folders import WorkFolder; print(WorkFolder().path, flush=True)"
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def aged(path: Path) -> Path:
    os.utime(path, (0, 0))
    return path


def left_behind() -> Path:
    """The folder of a process that was killed."""
    code = f"{LEAVE_BEHIND}; os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return Path(done.stdout.strip())


def test_only_what_nobody_has_any_more_is_swept_away():
    dead, in_use = aged(left_behind()), WorkFolder()
    (dead / "file").write_text("x")
    aged(dead)
    aged(in_use.path)
    assert sweep() == 1
    assert not dead.exists()
    assert in_use.path.exists()
    in_use.remove()
    assert not in_use.path.exists()


def test_a_folder_that_is_just_being_made_stays():
    path = left_behind()
    assert sweep() == 0
    assert path.exists()


def test_what_only_looks_like_a_folder_is_left_alone(tmp_path: Path):
    target = tmp_path / "elsewhere"
    target.mkdir()
    aged(target)
    (tmp_path / "longshore-verifier-link").symlink_to(target)
    aged_file = tmp_path / "longshore-verifier-file"
    aged_file.write_text("x")
    aged(aged_file)
    assert sweep() == 0
    assert target.exists()
    assert aged_file.exists()
