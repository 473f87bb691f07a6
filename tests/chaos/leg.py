"""One job under fire: submitted, watched from outside until it has ended, and what is needed to judge it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from chaos.broker_tap import BrokerTap
from chaos.faults import Executor
from chaos.learner_tap import LearnerTap
from chaos.proof import Evidence, Expected
from chaos.schedule import Fault, Kind
from chaos.world import World
from longshore.errors import LongshoreError
from longshore.rollout_queue import broker
from longshore.rollout_queue.ledger import Ledger
from longshore.types import JobRef

Json = dict[str, object]

LOOK_S = 0.25
READING_S = 1.0
# Nothing that is done to a job keeps it from its next train step for so long.
STUCK_S = 300.0
ENDED = frozenset({"succeeded", "failed", "cancelled"})
_READING_TIMEOUT_S = 3.0


@dataclass
class Readings:
    """Readings of the product's own ledger."""

    count: int = 0
    unbalanced: list[str] = field(default_factory=list)


class Leg:
    """Runs one job on a world while an executor does its worst."""

    def __init__(
        self,
        world: World,
        open_site: Callable[[Path], Awaitable[None]],
        executor: Executor,
        document: Json,
        say: Callable[[str], None],
    ) -> None:
        """`open_site`: starts the job's rollout site, given the job's folder, and lets the executor know of it."""
        self._world = world
        self._open_site = open_site
        self._executor = executor
        self._document = document
        self._say = say
        self._readings = Readings()
        self._state = "queued"
        self._progress_at = time.monotonic()
        self.job_id = ""
        self.stuck = ""

    async def run(self, taps: dict[str, BrokerTap], give_up: Callable[[], bool]) -> Evidence:
        """Returns when the job has ended; once `give_up`, nothing more is done to it."""
        async with self._world.api() as client:
            job = await client.submit(self._document)
        self.job_id, project = str(job["id"]), str(job["project"])
        ref, run_dir = JobRef(project, self.job_id), self._world.runs / self.job_id
        tap = LearnerTap(run_dir, self._world.store(project, self.job_id))
        tap.start()
        self._say(f"job {self.job_id} submitted")
        helpers = [asyncio.create_task(self._watch_state()), asyncio.create_task(self._read_ledger(ref))]
        watching = asyncio.create_task(self._watch_steps(tap))
        try:
            await self._until(lambda: (run_dir / "job.json").exists())
            await self._open_site(run_dir)
            # What is killed before the first checkpoint would only warm up once more.
            await self._until(lambda: bool(tap.facts.checkpoints))
            steps = self._expected().steps
            await self._executor.run(
                active=lambda: self._lives(run_dir) and not give_up(),
                allowed=lambda fault: _fits(fault, len(tap.facts.first_recorded) >= steps),
            )
            await self._executor.settle()
            await watching
        finally:
            for task in [*helpers, watching]:
                task.cancel()
            await asyncio.gather(*helpers, watching, return_exceptions=True)
            await asyncio.to_thread(tap.stop)
        return await self._evidence(ref, run_dir, tap, taps)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._state in ENDED or self.stuck:
                return
            await asyncio.sleep(LOOK_S)

    def _lives(self, run_dir: Path) -> bool:
        return self._state not in ENDED and not (run_dir / "summary.json").exists() and not self.stuck

    def _expected(self) -> Expected:
        train = self._document["train"]
        assert isinstance(train, dict)
        return Expected(train["steps"], train["groups_per_step"], train["group_size"])

    async def _watch_state(self) -> None:
        while self._state not in ENDED:
            await asyncio.sleep(LOOK_S)
            # The gateway, too, is killed now and then.
            with contextlib.suppress(LongshoreError, httpx.HTTPError):
                async with self._world.api() as client:
                    self._state = str((await client.job(self.job_id))["state"])

    async def _watch_steps(self, tap: LearnerTap) -> None:
        """Until the job has ended, or does not go on."""
        seen = 0
        self._progress_at = time.monotonic()
        while self._state not in ENDED:
            await asyncio.sleep(LOOK_S)
            recorded = tap.facts.first_recorded
            if len(recorded) > seen:
                seen, self._progress_at = len(recorded), time.monotonic()
                self._executor.stepped(max(list(recorded.values())))
            if tap.error is not None:
                self.stuck = f"the learner's files cannot be followed: {tap.error!r}"
            elif failed := self._world.failed():
                self.stuck = f"a unit was given up: {failed}"
            elif time.monotonic() - self._progress_at > STUCK_S:
                self.stuck = f"no train step for {STUCK_S:.0f} s after step {seen}"
            if self.stuck:
                return

    async def _read_ledger(self, job: JobRef) -> None:
        """What a person would be told at any moment."""
        while True:
            await asyncio.sleep(READING_S)
            client = broker.connect(f"unix://{self._world.broker_socket}", patience_s=1.0)
            try:
                async with asyncio.timeout(_READING_TIMEOUT_S):
                    counts = await Ledger(client, job).counts()
            except (LongshoreError, TimeoutError):
                # It is down or stopped, as it should be.
                continue
            finally:
                await client.aclose()
            self._readings.count += 1
            if not counts.balanced:
                self._readings.unbalanced.append(str(counts))

    async def _evidence(self, job: JobRef, run_dir: Path, tap: LearnerTap, taps: dict[str, BrokerTap]) -> Evidence:
        for broker_tap in taps.values():
            await asyncio.to_thread(broker_tap.catch_up)
        queues = {tap.name: tap.shadow.queue(str(job), tap.name) for tap in taps.values()}
        summary: Json = {}
        with contextlib.suppress(OSError, ValueError):
            summary = json.loads((run_dir / "summary.json").read_text())
        return Evidence(
            expected=self._expected(),
            state=self._state,
            summary=summary,
            home=queues.pop("home"),
            sites=queues,
            learner=tap.facts,
            rewards=_rewards(run_dir / "metrics.jsonl"),
            readings=self._readings.count,
            unbalanced=self._readings.unbalanced,
        )


def _fits(fault: Fault, all_recorded: bool) -> bool:
    """A broker that loses its tail when nobody is left to reconcile it proves nothing (docs/failures.md)."""
    return not (all_recorded and fault.kind in (Kind.TAIL_LOSS, Kind.MACHINE))


def _rewards(path: Path) -> list[tuple[int, float]]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    return [(int(line["step"]), float(line["reward/mean"])) for line in map(json.loads, lines)]
