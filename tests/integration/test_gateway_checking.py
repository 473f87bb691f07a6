"""The processes that check jobs: what a plug-in does to one of them, it does not do to the gateway."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from longshore.errors import InvalidJobSpec, Unavailable
from longshore.gateway.checking import CheckProcesses

MEMORY_MB = 512
# A plug-in of its own, on the path of the processes alone.
SOURCE = """
import os, signal, time
class Source:
    version = "test"
    def __init__(self, spec, seed, environment):
        print("says something")
        what = spec.options["what"]
        if what == "hold":
            self.held = bytearray(int(spec.options["mb"]) << 20)
        if what == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "hang":
            time.sleep(600)
    def task(self, ordinal):
        return None
"""
METADATA = "Metadata-Version: 2.1\nName: checked\nVersion: 1\n"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "checked_source.py").write_text(SOURCE)
    info = folder / "checked-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text("[longshore.task_sources]\nchecked = checked_source:Source\n")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [before])])
    yield folder
    os.environ["PYTHONPATH"] = before


@pytest.fixture
def checks(plugin: Path) -> Iterator[CheckProcesses]:
    checks = CheckProcesses(MEMORY_MB, timeout_s=30.0)
    yield checks
    checks.close()


def document(what: str, **options: object) -> dict[str, object]:
    return {
        "name": "j",
        "tasks": {"source": "checked", "options": {"what": what, **options}},
        "verifier": {"name": "exact-match"},
        "train": {"steps": 1},
    }


def faults(checks: CheckProcesses, spec: dict[str, object]) -> list[str]:
    with pytest.raises(InvalidJobSpec) as caught:
        checks.check_document(spec)
    return [f"{fault.path}: {fault.message}" for fault in caught.value.faults]


def helpers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "check_process" in " ".join(child.cmdline())]


def test_a_check_finds_what_there_is_and_its_process_is_used_again(checks: CheckProcesses) -> None:
    assert faults(checks, document("nothing")) == ["tasks.source: has no tasks"]
    (process,) = helpers()
    wrong = {**document("nothing"), "seed": "x", "verifier": {"name": "nobody's"}}
    assert [fault.partition(":")[0] for fault in faults(checks, wrong)] == ["seed", "verifier.name", "tasks.source"]
    assert helpers() == [process]
    checks.close()
    assert helpers() == []


def test_what_wants_too_much_memory_is_told_so(checks: CheckProcesses) -> None:
    assert faults(checks, document("hold", mb=64)) == ["tasks.source: has no tasks"]
    (fault,) = faults(checks, document("hold", mb=4 * MEMORY_MB))
    assert fault.startswith("tasks: needs more memory")
    assert faults(checks, document("nothing")) == ["tasks.source: has no tasks"]


def test_a_plug_in_that_brings_its_process_down_brings_nothing_else_down(checks: CheckProcesses) -> None:
    (fault,) = faults(checks, document("die"))
    assert fault.startswith(f"(document): ended the process that checked it (signal {int(signal.SIGSEGV)})")
    assert faults(checks, document("nothing")) == ["tasks.source: has no tasks"]


def test_no_job_is_blamed_for_a_process_that_died_before_it(checks: CheckProcesses) -> None:
    assert faults(checks, document("nothing")) == ["tasks.source: has no tasks"]
    (process,) = helpers()
    process.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert faults(checks, document("nothing")) == ["tasks.source: has no tasks"]


def test_one_that_does_not_end_is_ended(plugin: Path) -> None:
    checks = CheckProcesses(MEMORY_MB, timeout_s=1.5)
    try:
        with pytest.raises(Unavailable):
            checks.check_document(document("hang"))
        assert helpers() == []
    finally:
        checks.close()
