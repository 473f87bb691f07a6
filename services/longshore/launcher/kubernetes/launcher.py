"""The launcher over Kubernetes: each site of a job is a cluster, in which its processes are pods.

    consumes   what drivers apply and remove, what each cluster shows     waits for     news, 1 s at most
    produces   what each cluster's watcher wants, unit states             unblocked by  watchers, drivers

It keeps nothing on disk. A gateway that starts anew applies its jobs again, and what is there already is found by its
labels; of what nobody wants it says that it is there, and the gateway has it removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import structlog

from longshore.config import HOME_SITE
from longshore.errors import Conflict, Rejected, Unavailable
from longshore.launcher.kubernetes.cluster_settings import ClusterSettings, KubernetesSettings
from longshore.launcher.kubernetes.lives import SiteStatus
from longshore.launcher.kubernetes.scaler import Lag
from longshore.launcher.kubernetes.wanted import JobTexts, site_work
from longshore.launcher.kubernetes.watcher import ClusterApi, ClusterWatcher
from longshore.launcher.spec import ProcessSpec, ProcessState, ProcessStatus, UnitState, UnitStatus
from longshore.settings import JobFile

log = structlog.get_logger()

TELL_EVERY_S = 1.0
# For a removal to be seen done, before it is asked for again.
REMOVE_S = 20.0
# For the clusters to show what runs, before a gateway that has just started may say what does not.
FIRST_LOOK_S = 10.0
# A cluster that is away this long is not waited for when a job goes: it is cleaned up when it is back.
AWAY_S = 15.0


class KubernetesLauncher:
    """Implements the gateway's launcher. All of its work is done while somebody iterates over `watch`."""

    def __init__(
        self, settings: KubernetesSettings, connect: Callable[[str, ClusterSettings], ClusterApi], lag: Lag
    ) -> None:
        """
        Args:
            connect: makes the client of one cluster.
            lag: tickets of (job, project, site).
        """
        self.settings = settings
        self._clusters = {name: connect(name, cluster) for name, cluster in settings.clusters.items()}
        self._news = asyncio.Event()
        self._watchers = {
            name: ClusterWatcher(name, settings, cluster, lag, self._news.set)
            for name, cluster in self._clusters.items()
        }
        self._units: dict[str, tuple[ProcessSpec, ...]] = {}
        # How units ended; kept until they are removed.
        self._ends: dict[str, UnitStatus] = {}

    async def apply(self, unit: str, specs: Sequence[ProcessSpec]) -> None:
        """Has each site's part of a job wanted there; it is made soon after. The same unit again changes nothing.

        Raises:
            Conflict: the unit is there with other processes.
            Rejected: the job is at a site that no cluster is named for.
        """
        known = self._units.get(unit)
        if known is not None:
            if known != tuple(specs):
                raise Conflict(f"unit {unit} is there with other processes; remove it first")
            return
        file, texts = await asyncio.to_thread(_read, specs)
        parts = site_work(unit, file.project, file.spec, texts, specs)
        unknown = sorted(set(parts) - set(self._watchers))
        if unknown:
            there = ", ".join(sorted(self._watchers))
            raise Rejected("site", f"sites: no cluster is configured for {', '.join(unknown)}; there are {there}")
        self._units[unit] = tuple(specs)
        for site, work in parts.items():
            self._watchers[site].want(work)
        log.info("unit applied", unit=unit, clusters=sorted(parts))
        self._news.set()

    async def remove(self, unit: str, reason: str) -> None:
        """Removes a unit everywhere; returns once its pods are gone wherever that can be seen.

        Raises:
            Unavailable: they are not gone yet, or the home cluster is away. It goes on; ask again.
        """
        if unit in self._units:
            log.info("unit removed", unit=unit, reason=reason)
        self._units.pop(unit, None)
        self._ends.pop(unit, None)
        before = {site: watcher.looks for site, watcher in self._watchers.items()}
        for watcher in self._watchers.values():
            watcher.unwant(unit)
        deadline = time.monotonic() + REMOVE_S
        while waiting := [site for site in self._watchers if self._holds(site, unit, before[site])]:
            if time.monotonic() > deadline:
                raise Unavailable(f"{unit} is being removed from {', '.join(waiting)}")
            await asyncio.sleep(0.2)

    def _holds(self, site: str, unit: str, looks: int) -> bool:
        """Whether a removal has still to be waited for at a site."""
        watcher = self._watchers[site]
        if site != HOME_SITE and watcher.away_s > AWAY_S:
            return False
        # The look that goes on may have begun before the removal.
        return watcher.looks < looks + 2 or unit in (watcher.present or ())

    async def watch(self) -> AsyncIterator[dict[str, UnitStatus]]:
        """Every unit's state, at once and on every change. Raises what ends a watcher: a bug of ours."""
        last: dict[str, UnitStatus] | None = None
        tasks = [asyncio.create_task(watcher.run(), name=f"cluster-{site}") for site, watcher in self._watchers.items()]
        try:
            await self._first_look(tasks)
            while True:
                self._news.clear()
                _check(tasks)
                now = self._statuses()
                if now != last:
                    last = now
                    yield now
                await self._await_news(TELL_EVERY_S)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=5.0)
            await self.close()

    async def close(self) -> None:
        """Lets go of the clusters; what runs there goes on."""
        for cluster in self._clusters.values():
            await cluster.close()

    async def _first_look(self, tasks: list[asyncio.Task[None]]) -> None:
        """Without the home cluster nothing can be said; another may be away for hours."""
        deadline = time.monotonic() + FIRST_LOOK_S
        home = self._watchers[HOME_SITE]
        while home.present is None or (
            time.monotonic() < deadline and any(watcher.present is None for watcher in self._watchers.values())
        ):
            _check(tasks)
            self._news.clear()
            await self._await_news(0.2)

    async def _await_news(self, seconds: float) -> None:
        # Not wait_for, which until Python 3.12 may lose a cancellation.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()

    def _statuses(self) -> dict[str, UnitStatus]:
        """Of every unit that is wanted, and of those that only a cluster knows: jobs that ended without a gateway."""
        found = {unit: self._status(unit) for unit in self._units}
        for watcher in self._watchers.values():
            for unit in watcher.present or ():
                found.setdefault(unit, UnitStatus(unit, UnitState.RUNNING))
        return found

    def _status(self, unit: str) -> UnitStatus:
        if unit in self._ends:
            return self._ends[unit]
        parts = {site: watcher.status(unit) for site, watcher in self._watchers.items()}
        told = [status for status in parts.values() if status is not None]
        processes = tuple(process for status in told for process in status.processes)
        end = _end(told)
        if end is None:
            # Of a job of which nothing was seen yet, not all is ready.
            return UnitStatus(unit, UnitState.RUNNING, "", processes or _planned(self._units[unit]))
        assert end.end is not None
        self._ends[unit] = UnitStatus(unit, end.end, end.message, processes)
        return self._ends[unit]


def _check(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()


def _planned(specs: Sequence[ProcessSpec]) -> tuple[ProcessStatus, ...]:
    return tuple(ProcessStatus(spec.name, ProcessState.STARTING, 0, 0, None, str(spec.log_path)) for spec in specs)


def _end(parts: Sequence[SiteStatus]) -> SiteStatus | None:
    """A learner that is done outweighs what died beside it."""
    ends = [part for part in parts if part.end is not None]
    return next((part for part in ends if part.end is UnitState.SUCCEEDED), ends[0] if ends else None)


def _read(specs: Sequence[ProcessSpec]) -> tuple[JobFile, JobTexts]:
    """What the gateway wrote for the job's processes. Raises Rejected when it is not there."""
    env = {name: value for spec in specs for name, value in spec.env.items()}
    try:
        text = Path(env["LONGSHORE_JOB_FILE"]).read_text(encoding="utf-8")
        keys = Path(env["LONGSHORE_OPENAI_KEYS_FILE"]).read_text(encoding="utf-8")
        return JobFile.model_validate_json(text), JobTexts(text, keys)
    except (KeyError, OSError, ValueError) as error:
        raise Rejected("job", f"the job's files cannot be read: {error}") from None
