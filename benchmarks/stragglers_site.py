"""One actor process of benchmarks/stragglers.py: the real Runner, spool and queues, whose work is to sleep.

Started by `Site`; `main` is the process. How long a ticket takes depends on the seed and the ticket alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.stragglers_load import Load, make_rollout
from longshore.actor.metrics import ActorMetrics
from longshore.actor.outbox import Finished, Outbox, SpoolPlace
from longshore.actor.runner import Runner, RunnerLimits
from longshore.actor.sweeper import Sweeper
from longshore.rollout_queue import broker
from longshore.rollout_queue.rollouts import RolloutQueue
from longshore.rollout_queue.spool import Spool
from longshore.rollout_queue.tickets import Claim, TicketQueue
from longshore.rpc.convert_rollout import rollout_to_bytes
from longshore.types import JobRef

ROOT = Path(__file__).resolve().parent.parent
ACTORS = 2
LEASE_S = 15.0
SPOOL_BYTES = 512 * 1024 * 1024
BROKER_PATIENCE_S = 30.0
START_S = 30.0
STOP_S = 20.0


class Site:
    """`ACTORS` actor processes that share a load's slots, for as long as a block runs."""

    def __init__(self, url: str, job: JobRef, load: Load, folder: Path) -> None:
        self._arguments = {"url": url, "job": [job.project, job.job], "load": dataclasses.asdict(load)}
        self._slots = load.slots
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def version_file(self) -> Path:
        """Where the newest policy version stands: what a generator would have taken up."""
        return self._folder / "version"

    def __enter__(self) -> Site:
        write_version(self.version_file, 0)
        for number in range(ACTORS):
            arguments = {
                **self._arguments,
                "name": f"actor-{number}",
                "places": self._slots // ACTORS + (number < self._slots % ACTORS),
                "folder": str(self._folder),
            }
            argv = [sys.executable, "-m", "benchmarks.stragglers_site", json.dumps(arguments)]
            with (self._folder / f"actor-{number}.log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        argv, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
                    )
                )
        deadline = time.monotonic() + START_S
        while len(list(self._folder.glob("actor-*.ready"))) < ACTORS:
            if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                self._end()
                raise RuntimeError(f"an actor did not start: {self._logs()}")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if kind is None and any(process.returncode for process in self._processes):
            raise RuntimeError(f"an actor failed: {self._logs()}")

    def attempts(self) -> list[tuple[float, float]]:
        """Start and end of every attempt, on the monotonic clock; after the end of the block."""
        found = []
        for path in self._folder.glob("actor-*.attempts"):
            found += [(start, end) for start, end in json.loads(path.read_text(encoding="utf-8"))]
        return found

    def processor_s(self) -> float:
        """Seconds of processor time that the actors have used."""
        total = 0.0
        for process in self._processes:
            fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self._folder.glob("actor-*.log"))


def write_version(path: Path, version: int) -> None:
    """Replaces the newest version in one act."""
    part = path.with_suffix(".part")
    part.write_text(str(version), encoding="ascii")
    part.replace(path)


class _Sleeper:
    """The work of one actor process."""

    def __init__(self, load: Load, version_file: Path) -> None:
        self._load = load
        self._durations = load.durations()
        self._version_file = version_file
        self.attempts: list[tuple[float, float]] = []

    async def work(self, claim: Claim) -> Finished:
        started = time.monotonic()
        ticket = claim.ticket
        version = int(self._version_file.read_text(encoding="ascii"))
        await asyncio.sleep(self._durations[self._load.number(ticket.ref)])
        rollout = make_rollout(ticket.ref, ticket.task.task_id, version, ticket.sampling.temperature, claim.attempt)
        self.attempts.append((started, time.monotonic()))
        return Finished(rollout_to_bytes(rollout))


async def _serve(arguments: dict[str, Any]) -> None:
    folder, name = Path(arguments["folder"]), arguments["name"]
    job, load = JobRef(*arguments["job"]), Load(**arguments["load"])
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    client = broker.connect(arguments["url"])
    rollouts, counting = RolloutQueue(client, job), ActorMetrics(job.project, job.job, "home")
    spool = Spool.open(folder / f"{name}.spool", SPOOL_BYTES)
    sleeper = _Sleeper(load, folder / "version")
    runner = Runner(
        name,
        TicketQueue(client, job, lease_ms=int(LEASE_S * 1000)),
        Outbox(rollouts, SpoolPlace(spool, folder), BROKER_PATIENCE_S, counting),
        sleeper.work,
        RunnerLimits(arguments["places"], LEASE_S, drain_s=1.0, broker_patience_s=BROKER_PATIENCE_S),
        counting,
    )
    (folder / f"{name}.ready").touch()
    try:
        async with asyncio.TaskGroup() as group:
            sweeper = Sweeper(job, spool, rollouts, partial(broker.incarnation, client), counting)
            sweeping = group.create_task(sweeper.run())
            await runner.run(stop)
            sweeping.cancel()
    finally:
        spool.close()
        await client.aclose()
        (folder / f"{name}.attempts").write_text(json.dumps(sleeper.attempts), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])))
