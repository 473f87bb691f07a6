from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longshore.errors import ConfigError, Conflict, NotFound, Unavailable
from longshore.weight_store.objects import Objects, StorageFull, open_objects


@pytest.fixture(params=["folder", "memory"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return open_objects(str(tmp_path / "a" / "b") if request.param == "folder" else "memory:///")


def test_bytes_come_back(objects: Objects) -> None:
    objects.put("x/y", b"first")
    objects.put("x/y", io.BytesIO(b"0123456789"))
    assert objects.get("x/y") == b"0123456789"
    assert objects.size("x/y") == 10
    assert objects.read("x/y", 4, 3) == b"456"
    assert objects.read("x/y", 8, 30) == b"89"
    assert [(item.path, item.size) for item in objects.list("x")] == [("x/y", 10)]
    assert objects.list("nowhere") == []
    objects.delete("x/y")
    objects.delete("x/y")
    for ask in (objects.get, objects.size, lambda path: objects.read(path, 0, 1)):
        with pytest.raises(NotFound):
            ask("x/y")


def test_what_exists_is_not_created_again(objects: Objects) -> None:
    objects.create("x", b"1")
    with pytest.raises(Conflict):
        objects.create("x", b"2")
    assert objects.get("x") == b"1"


def test_a_large_file_is_written_whole(tmp_path: Path) -> None:
    """Over the size where obstore sends it in parts."""
    objects = open_objects(f"file://{tmp_path}")
    data = os.urandom(6 * 1024 * 1024)
    objects.put("x", io.BytesIO(data))
    assert (tmp_path / "x").read_bytes() == data


def test_what_a_killed_write_left_is_swept_when_old(tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path))
    objects.put("job/blobs/aa", b"1")
    old, young = tmp_path / "job/blobs/bb#1", tmp_path / "job/blobs/cc#12"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert [item.path for item in objects.list("job")] == ["job/blobs/aa"]
    objects.sweep_staged("job", older_than=time.time() - 60)
    assert sorted(path.name for path in (tmp_path / "job/blobs").iterdir()) == ["aa", "cc#12"]


def test_a_failing_store_is_unavailable(tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path))
    objects.put("x", b"1")
    with pytest.raises(Unavailable):
        objects.put("x/y", b"a folder is wanted where a file is")


def test_a_full_disk_is_told_apart(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longshore.weight_store.objects.obstore.put", full)
    with pytest.raises(StorageFull):
        objects.put("x", b"1")


@pytest.mark.parametrize("url", ["gopher://x", "/proc/nowhere/store", "s3://"])
def test_a_store_that_cannot_be_is_a_setting_that_cannot_work(url: str) -> None:
    with pytest.raises(ConfigError, match="LONGSHORE_STORE_URL"):
        open_objects(url)


def test_readers_need_neither_obstore_nor_torch() -> None:
    code = "import sys, longshore.weights.client; print(*{'obstore', 'torch', 'numpy', 'redis'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "services")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "")
