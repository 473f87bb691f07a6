"""A whole run: one stack, jobs one after another until the schedule is done, and the proof of each."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from chaos import disk, netns, report
from chaos.broker_tap import BrokerTap
from chaos.disk import SmallDisk
from chaos.faults import GONE, Begin, Executor
from chaos.leg import Json, Leg
from chaos.netns import Namespace
from chaos.proof import prove
from chaos.schedule import KILLS, Kind, Place, plan, targets_at, targets_at_home
from chaos.site import SITE_LEASE_S, Site
from chaos.world import Machine, World
from longshore.config import SiteSpec

# Checkpoints, logs and batch records of a few jobs; the site's broker and spools of one.
RUNS_MB, SITE_MB = 512, 192
SITE = SiteSpec(name="west", actors=1, allowance=128)
RUNS_DISK, SITE_DISK, LINK = "disk of home", f"disk of {SITE.name}", f"link of {SITE.name}"


@dataclass(frozen=True)
class Settings:
    """Of one run. `limit_s` 0: none."""

    kills: int
    seed: int
    pace_s: float
    steps: int
    limit_s: float
    # Jobs replay rollouts, and evaluate while they train.
    replay: bool = False


class Session:
    """Owns the folder, the schedule, the stack, and the site of the job that runs."""

    def __init__(self, settings: Settings, folder: Path, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.skipped: list[str] = []
        self._folder = folder
        self._say = say
        self._disk = SmallDisk(folder / "runs", RUNS_MB)
        targets, places = [*targets_at_home(), *targets_at(SITE.name)], []
        if why := disk.why_not():
            self.skipped.append(f"full disks: {why}")
        else:
            places += [Place(name, Kind.DISK_FULL, 2, (3.0, 8.0)) for name in (RUNS_DISK, SITE_DISK)]
        if why := netns.why_not():
            self.skipped.append(f"partitions: {why}")
        else:
            places.append(Place(LINK, Kind.PARTITION, 4, (4.0, 22.0)))
        self._namespaces = not why
        self.faults = plan(settings.seed, settings.kills, targets, places, settings.pace_s)
        self._machines: list[Machine] = []
        self._taps: dict[str, BrokerTap] = {}
        self._places: dict[str, Begin] = {RUNS_DISK: _filling(self._disk)}

    async def run(self) -> dict[str, object]:
        """Runs everything. Returns the results; `breaches` is empty when all is proven."""
        began = time.monotonic()
        result: dict[str, object] = {"seed": self.settings.seed, "skipped": self.skipped}
        breaches: list[str] = []
        jobs: list[dict[str, object]] = []
        executor = Executor(self._machines, self.faults, self._taps, self._places)

        def late() -> bool:
            return bool(self.settings.limit_s) and time.monotonic() - began > self.settings.limit_s

        self._disk.mount()
        async with World(self._folder) as world:
            self._machines.append(world)
            home = self._taps["broker"] = BrokerTap("home", world.broker_folder)
            home.start()
            while True:
                leg_breaches, facts, over = await self._leg(world, executor, len(jobs), late)
                breaches += leg_breaches
                jobs.append(facts)
                if over or not executor.left or late():
                    break
            home.stop()
            breaches += [home.error] if home.error else []
        done = sum(outcome.fault.kind in KILLS and outcome.note != GONE for outcome in executor.outcomes)
        if done < self.settings.kills:
            breaches.append(f"only {done} of {self.settings.kills} kills were done")
        found_rows = report.rows(executor.outcomes)
        self._say(report.table(found_rows))
        tails = [[loss.size, round(loss.seconds, 2)] for loss in home.losses]
        result |= {"kills": done, "faults": len(executor.outcomes), "tails_lost_at_home": tails}
        return result | {"jobs": jobs, "rows": report.as_json(found_rows), "breaches": breaches}

    async def _leg(
        self, world: World, executor: Executor, number: int, late: Callable[[], bool]
    ) -> tuple[list[str], dict[str, object], bool]:
        """One job: its breaches, its facts, and whether there is no sense in another."""
        async with contextlib.AsyncExitStack() as resources:
            open_site = functools.partial(self._open_site, world, resources)
            leg = Leg(world, open_site, executor, job_document(number, self.settings), self._say)
            evidence = await leg.run(self._taps, late)
            found = ([leg.stuck] if leg.stuck else []) + prove(evidence)
            self._say(f"job {leg.job_id}: {evidence.state}, {len(found)} breaches, {executor.left} faults to come")
            for breach in found:
                self._say(f"  {breach}")
            breaches = [f"{leg.job_id}: {breach}" for breach in found]
            return breaches, report.facts(leg.job_id, evidence), bool(leg.stuck)

    async def _open_site(self, world: World, resources: contextlib.AsyncExitStack, run_dir: Path) -> None:
        """Starts the job's site and tells the executor; undone when `resources` are closed."""
        small = SmallDisk(run_dir / "sites" / SITE.name, SITE_MB)
        small.mount()
        resources.callback(small.close)
        namespace = Namespace(f"lsc{os.getpid()}", os.getpid() % 253 + 1) if self._namespaces else None
        if namespace is not None:
            resources.callback(namespace.close)
            namespace.open()
        site = Site(SITE, world, run_dir, namespace)
        tap = BrokerTap(SITE.name, site.broker_folder)
        tap.start()
        resources.callback(tap.stop)
        resources.push_async_callback(site.stop)
        await site.start()
        self._machines.append(site)
        self._taps[f"{SITE.name}-broker"] = tap
        self._places |= {SITE_DISK: _filling(small), LINK: site.partition}
        resources.callback(self._machines.remove, site)
        for known, name in ((self._taps, f"{SITE.name}-broker"), (self._places, SITE_DISK), (self._places, LINK)):
            resources.callback(known.pop, name)

    def close(self, keep: bool) -> None:
        """Removes the folder, unless it is kept for whoever has to find out."""
        if keep:
            kept = self._folder / "kept-runs"
            shutil.copytree(
                self._folder / "runs", kept, ignore=shutil.ignore_patterns("*.safetensors", "ballast", "*.sock")
            )
            self._say(f"state and logs are left in {self._folder}")
        self._disk.close()
        if not keep:
            shutil.rmtree(self._folder, ignore_errors=True)


def _filling(small: SmallDisk) -> Begin:
    """Fills the disk; what it returns frees it."""

    async def fill() -> Callable[[], Awaitable[None]]:
        await asyncio.to_thread(small.fill)

        async def free() -> None:
            small.free()

        return free

    return fill


def job_document(number: int, settings: Settings) -> Json:
    """A small job whose reward rises within its steps: the recipe of examples/first-light.yaml, at half its width."""
    replay = {"replay": {"share": 0.33, "max_uses": 3}} if settings.replay else {}
    return {
        "name": f"chaos-{number}",
        "seed": settings.seed % 1000 + number,
        "model": {
            "kind": "new",
            "hidden_size": 256,
            "layers": 2,
            "heads": 8,
            "kv_heads": 4,
            "intermediate_size": 512,
            "max_context": 48,
            "rope_theta": 100,
        },
        "tasks": {
            "source": "reasoning-gym",
            "dataset": "spell_backward",
            "options": {"min_word_len": 3, "max_word_len": 6},
            "heldout_fraction": 0.1,
        },
        "verifier": {"name": "reasoning-gym"},
        "sampling": {"temperature": 1.0, "max_new_tokens": 12},
        "warm_start": {
            "steps": 330,
            "batch_size": 32,
            "learning_rate": 2e-3,
            "clean_fraction": 0.85,
            "wrong_fraction": 0.65,
        },
        "train": {
            "steps": settings.steps,
            "groups_per_step": 16,
            "group_size": 8,
            "learning_rate": 3e-4,
            "final_learning_rate": 5e-5,
            "warmup_steps": 10,
            "target_staleness": 2,
            "checkpoint_every": 5,
            **replay,
        },
        "evaluation": {"tasks": 100, "every": 10 if settings.replay else 0},
        "weights": {"dtype": "float32", "keep": 16},
        "resources": {"actor_lease_s": 5.0, "site_lease_s": SITE_LEASE_S, "max_attempts": 10},
    }
