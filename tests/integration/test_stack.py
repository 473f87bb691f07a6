"""The local stack through the command line: real broker, weight store and gateway, ended in every way there is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_processes import processes_that_mention, wait_until

from longshore.launcher.state_dir import read_up

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

DEADLINE_S = 90.0


class Here:
    """A folder in which the command is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / ".longshore"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LONGSHORE_", "REDIS_URL"))}
        # Every process that belongs to this test can be told by it.
        self.env = {**kept, "LONGSHORE_HOME": str(self.state)}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "longshore", *arguments],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=DEADLINE_S)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def up(self) -> subprocess.Popen[str]:
        """A stack in the foreground, once it is up."""
        process = self.start("up")
        wait_until(lambda: self.owner == process.pid or process.poll() is not None, DEADLINE_S, "the stack")
        assert process.poll() is None, process.communicate()
        return process

    @property
    def owner(self) -> int | None:
        """The process whose stack is up, if any."""
        up = read_up(self.state)
        return up.pid if up else None

    @property
    def is_up(self) -> bool:
        return (self.state / "up.json").exists()

    @property
    def left(self) -> list[int]:
        return processes_that_mention(str(self.state))

    def nothing_is_left(self) -> None:
        wait_until(lambda: not self.left, 5.0, f"the end of {self.left}")
        assert not self.is_up
        assert not (self.state / "api.key").exists()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    here = Here(tmp_path)
    yield here
    for process in here.started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_stacks_one_after_another_each_ended_in_its_own_way(here: Here) -> None:
    up = here.up()
    assert len(here.left) >= 4
    up.send_signal(signal.SIGINT)
    _, err = up.communicate(timeout=DEADLINE_S)
    assert (up.returncode, err) == (130, "")
    here.nothing_is_left()

    # Killed outright, it cannot tidy up; nothing outlives it all the same, and the next one finds its way.
    killed = here.up()
    killed.kill()
    killed.wait()
    wait_until(lambda: not here.left, 10.0, "the end of what a killed stack had started")
    assert here.call("jobs").stderr == "longshore: no stack is running here; start one with `longshore up`\n"

    detached = here.call("up", "--detach")
    assert detached.returncode == 0, detached.stderr
    up_file = json.loads((here.state / "up.json").read_text())
    assert up_file["url"] in detached.stdout
    assert "$(cat .longshore/api.key)" in detached.stdout
    assert json.loads(urllib.request.urlopen(f"{up_file['url']}/healthz", timeout=10).read())["status"] == "serving"
    assert here.call("jobs").returncode == 0
    # The gateway knows what is installed and which files there are: nothing that is wrong waits for the next try.
    job = "name: A B\ntasks: {source: jsonl, path: none.jsonl}\nverifier: {name: nope}\ntrain: {steps: 0}\n"
    (here.folder / "bad.yaml").write_text(job)
    refused = here.call("submit", "bad.yaml")
    assert (refused.returncode, refused.stdout) == (2, "")
    paths = {line.removeprefix("longshore: ").split(": ")[0] for line in refused.stderr.splitlines()}
    assert paths == {"name", "train.steps", "verifier.name", "tasks.path"}

    second = here.call("up")
    assert second.returncode == 1
    assert f"a stack is running already in {here.state} (process {up_file['pid']})" in second.stderr
    assert len(second.stderr.splitlines()) == 1

    down = here.call("down")
    assert down.returncode == 0, down.stderr
    here.nothing_is_left()


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_while_it_starts(here: Here, presses: int) -> None:
    up = here.start("up")
    wait_until(lambda: bool((here.state / "logs" / "broker.log").exists()), DEADLINE_S, "the first process")
    for _ in range(presses):
        up.send_signal(signal.SIGINT)
    _, err = up.communicate(timeout=DEADLINE_S)
    assert (up.returncode, err) == (130, "")
    here.nothing_is_left()


def test_a_service_that_keeps_dying_is_one_message_and_stops_all(here: Here) -> None:
    here.state.mkdir()
    (here.state / "longshore.db").write_text("this is no database\n" * 100)
    up = here.call("up")
    assert up.returncode == 1
    lines = up.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("longshore: gateway died 3 times in a row without becoming ready (exit code 1)")
    assert "file is not a database" in lines[0]
    assert lines[0].endswith(f"its log: {here.state / 'logs' / 'gateway.log'}")
    here.nothing_is_left()
