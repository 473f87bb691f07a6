"""The stack of benchmarks/recovery.py: `longshore up` with one small job, and what is seen of it from outside.

Two watchers write down what happens and when (Unix seconds): the supervisor's stream of process states, and the job's
events, whose times are the broker's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import yaml
from redis.asyncio import Redis

from longshore.errors import Unavailable
from longshore.launcher.client import SupervisorClient
from longshore.launcher.spec import ProcessState
from longshore.rollout_queue import broker
from longshore.rollout_queue.channel import JobChannel
from longshore.rollout_queue.keys import ACTORS, JobKeys
from longshore.types import JobRef

T = TypeVar("T")
START_S = 120.0
CALL_S = 60.0
STOP_S = 40.0
TICK_S = 0.02
# Short, so that a lease that ran out can be told from the supervisor's own look at a stopped process.
ACTOR_LEASE_S = 6
JOB: dict[str, Any] = {
    "name": "recovery",
    "model": {
        "kind": "new",
        "hidden_size": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "intermediate_size": 128,
        "max_context": 48,
    },
    "tasks": {
        "source": "reasoning-gym",
        "dataset": "spell_backward",
        "options": {"min_word_len": 3, "max_word_len": 5},
        "heldout_fraction": 0.1,
    },
    "verifier": {"name": "reasoning-gym"},
    "sampling": {"max_new_tokens": 10},
    "warm_start": {"steps": 60, "batch_size": 16},
    "train": {"steps": 1_000_000, "groups_per_step": 8, "group_size": 4, "target_staleness": 1, "checkpoint_every": 10},
    "weights": {"dtype": "float32"},
    "resources": {"actors": 2, "rollouts_per_actor": 16, "actor_lease_s": ACTOR_LEASE_S},
}


@dataclass(frozen=True)
class Sighting:
    """What the supervisor said of a process, and when."""

    at: float
    process: str
    state: ProcessState
    pid: int


@dataclass(frozen=True)
class Told:
    """One of the job's events, and when the broker got it."""

    at: float
    event: dict[str, Any]


class LocalStack:
    """A running stack with the job on it, in a folder of its own, for as long as a block runs."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="ls-recovery-")
        self.folder = Path(self._home.name)
        self.sightings: list[Sighting] = []
        self.told: list[Told] = []
        self._up: subprocess.Popen[bytes] | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._ends = contextlib.AsyncExitStack()

    async def __aenter__(self) -> LocalStack:
        try:
            await self._start()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / self.job.job

    def pid(self, process: str) -> int:
        """Of the newest life of a process that has been seen."""
        return next(seen.pid for seen in reversed(self.sightings) if seen.process == process and seen.pid)

    def send(self, process: str, number: signal.Signals) -> tuple[float, int]:
        """Sends a signal. Returns when, and to which pid."""
        pid = self.pid(process)
        at = time.time()
        os.kill(pid, number)
        return at, pid

    async def until(self, found: Callable[[], T | None], within_s: float, what: str) -> T:
        """The first answer that is not None. Raises RuntimeError when there is none in time."""
        deadline = time.monotonic() + within_s
        while (answer := found()) is None:
            for watcher in self._watchers:
                if watcher.done():
                    await watcher
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {within_s:.0f} s for {what}; {self._tail()}")
            await asyncio.sleep(TICK_S)
        return answer

    def seen(self, process: str, since: float, fits: Callable[[Sighting], bool]) -> Sighting | None:
        """The first sighting of a process after a moment that fits."""
        return next((s for s in self.sightings if s.process == process and s.at > since and fits(s)), None)

    def steps(self, since: float = 0.0) -> list[Told]:
        """The train steps that were told of after a moment."""
        return [told for told in self.told if told.at > since and told.event["type"] == "step"]

    async def ready_again(self, process: str, since: float, pid: int, within_s: float) -> float:
        """When a process whose old life was `pid` became ready."""

        def found() -> float | None:
            seen = self.seen(process, since, lambda s: s.state is ProcessState.READY and s.pid != pid)
            return seen.at if seen else None

        return await self.until(found, within_s, f"{process} to be ready again")

    async def step_after(self, since: float, within_s: float = START_S) -> Told:
        """The first train step that was told of after a moment."""
        return await self.until(lambda: next(iter(self.steps(since)), None), within_s, "a train step")

    async def held_by(self, actor: str) -> list[str]:
        """Stream ids of the tickets that an actor holds."""
        keys = JobKeys(self.job)
        found = await self._redis.xpending_range(keys.tickets, ACTORS, "-", "+", 1000, consumername=actor)
        return [broker.text(entry_id) for item in found if isinstance(entry_id := item["message_id"], bytes | str)]

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._up = _start_up(self.folder)
        up = self.folder / ".longshore" / "up.json"
        await self.until(lambda: up.exists() or None, START_S, "the stack")
        (self.folder / "job.yaml").write_text(yaml.safe_dump(JOB), encoding="utf-8")
        submitted = await asyncio.to_thread(
            subprocess.run,
            _longshore("submit", "job.yaml"),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=CALL_S,
            check=False,
        )
        if submitted.returncode:
            raise RuntimeError(f"the job was refused: {submitted.stdout}{submitted.stderr}")
        self.job = JobRef("default", submitted.stdout.strip())
        environment = _gateway_environment(self._up.pid)
        self._supervisor = SupervisorClient(environment["LONGSHORE_SUPERVISOR"])
        self._ends.push_async_callback(self._supervisor.close)
        self._redis: Redis = broker.connect(environment["LONGSHORE_BROKER_URL"])
        self._ends.push_async_callback(self._redis.aclose)
        self._watchers = [asyncio.create_task(self._watch_processes()), asyncio.create_task(self._watch_events())]

    async def _watch_processes(self) -> None:
        known: dict[str, tuple[ProcessState, int]] = {}
        async for units in self._supervisor.watch():
            now = time.time()
            for unit in units.values():
                for process in unit.processes:
                    said = (process.state, process.pid)
                    if known.get(process.name) != said:
                        known[process.name] = said
                        self.sightings.append(Sighting(now, process.name, *said))

    async def _watch_events(self) -> None:
        channel, after = JobChannel(self._redis, self.job), "0"
        while True:
            try:
                page = await channel.read(after, 1000, 200)
            except Unavailable:
                continue
            for after, event in page:
                self.told.append(Told(int(after.partition("-")[0]) / 1000, event))

    async def _end(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self._ends.aclose()
        if self._up is not None and self._up.poll() is None:
            # The second one leaves nothing time to drain.
            for _ in range(2):
                self._up.send_signal(signal.SIGINT)
                await asyncio.sleep(0.5)
            try:
                await asyncio.to_thread(self._up.wait, STOP_S)
            except subprocess.TimeoutExpired:
                self._up.kill()
                self._up.wait()
        self._home.cleanup()

    def _tail(self) -> str:
        log = self.folder / "up.log"
        return log.read_text(errors="replace")[-1000:] if log.exists() else ""


def _start_up(folder: Path) -> subprocess.Popen[bytes]:
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("LONGSHORE_", "REDIS_URL"))}
    with (folder / "up.log").open("wb") as sink:
        return subprocess.Popen(_longshore("up"), cwd=folder, env=kept, stdout=sink, stderr=sink)


def _longshore(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "longshore", *arguments]


def _gateway_environment(supervisor: int) -> dict[str, str]:
    """What the supervisor has told its gateway: where the supervisor itself and the broker are."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            items = (folder / "environ").read_bytes().decode().split("\0")
        except (OSError, ValueError):
            continue
        if parent == supervisor and "LONGSHORE_NAME=gateway" in items:
            return dict(item.split("=", 1) for item in items if "=" in item)
    raise RuntimeError("the stack has no gateway")


def batch_steps(run_dir: Path) -> list[int]:
    """The train steps of the learner's batch record, in the order in which they were recorded."""
    lines = (run_dir / "learner" / "batches.jsonl").read_text(encoding="utf-8").splitlines()
    return [int(json.loads(line)["step"]) for line in lines]
