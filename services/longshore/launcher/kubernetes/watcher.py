"""One cluster, looked at every few seconds and brought nearer to what is wanted of it.

    consumes   jobs that are wanted at its site, what the API shows     waits for     3 s; longer while it is away
    produces   applies and deletes, states of jobs, copies of logs      unblocked by  `wake`

It never waits for another cluster. One that is away is asked again after a second, then twice as long, up to a minute;
what was last known of it stays, and when it is back the difference is worked off.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import structlog

from longshore.errors import Rejected, Unavailable
from longshore.launcher.kubernetes import metrics
from longshore.launcher.kubernetes.cluster_settings import KubernetesSettings
from longshore.launcher.kubernetes.keda import KEDA
from longshore.launcher.kubernetes.lives import PodSeen, SiteLives, SiteStatus, read_pod
from longshore.launcher.kubernetes.manifests import Around, common_labels, manifests
from longshore.launcher.kubernetes.pod_logs import PodLogs
from longshore.launcher.kubernetes.reconcile import Acts, Key, Mark, acts, job_site, key_of, mark_of
from longshore.launcher.kubernetes.scaler import Lag, Scaler
from longshore.launcher.kubernetes.wanted import Manifest, SiteWork
from longshore.launcher.spec import UnitState

log = structlog.get_logger()

LOOK_EVERY_S = 3.0
# After a look that led to something: what was made may have to be named, or has made something itself.
SOON_S = 0.3
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 60.0
_KINDS_FOR_S = 300.0
_ALWAYS = [
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
    ("v1", "Service"),
    ("v1", "PersistentVolumeClaim"),
    ("v1", "Pod"),
    ("apps/v1", "Deployment"),
    ("apps/v1", "StatefulSet"),
    ("batch/v1", "Job"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
]
_JOBSET = "jobset.x-k8s.io/v1alpha2"
_WHERE_KNOWN = [(_JOBSET, "JobSet"), (KEDA, "ScaledObject"), (KEDA, "TriggerAuthentication")]


class NoAnswer(Unavailable):
    """A cluster did not answer at all: nothing else need be asked of it now."""


class ClusterApi(Protocol):
    """One cluster's API, as Cluster gives it; every method raises Unavailable while it is away."""

    async def kinds(self) -> frozenset[str]: ...

    async def get(self, api_version: str, kind: str, name: str) -> Manifest | None: ...

    async def list(self, api_version: str, kind: str, labels: Mapping[str, str]) -> list[Manifest]: ...

    async def apply(self, manifest: Manifest) -> Manifest: ...

    async def delete(self, api_version: str, kind: str, name: str) -> None: ...

    async def log(self, pod: str, since_s: int, limit_bytes: int) -> str: ...

    async def close(self) -> None: ...


@dataclass
class _Job:
    """One job that is wanted here."""

    work: SiteWork
    lives: SiteLives = field(default_factory=SiteLives)
    status: SiteStatus | None = None
    # What of it the cluster will never take.
    refused: str = ""
    trouble: tuple[str, ...] = ()


class ClusterWatcher:
    """Runs until cancelled. Its jobs are set by whoever owns it; what it tells is read there, after `on_news`."""

    def __init__(
        self, site: str, shared: KubernetesSettings, cluster: ClusterApi, lag: Lag, on_news: Callable[[], None]
    ) -> None:
        self.site = site
        # Jobs that objects were seen of at the last look, wanted or not; None before the first.
        self.present: frozenset[str] | None = None
        # Counts the looks that came to their end.
        self.looks = 0
        self._shared = shared
        self._settings = shared.clusters[site]
        self._cluster = cluster
        self._on_news = on_news
        self._jobs: dict[str, _Job] = {}
        self._removing: set[str] = set()
        self._wake = asyncio.Event()
        self._away_since: float | None = time.monotonic()
        self._kinds: frozenset[str] = frozenset()
        self._kinds_until = 0.0
        self._owner: Manifest | None = None
        self._marks: dict[Key, Mark] = {}
        self._logs = PodLogs()
        self._scaler = Scaler(site, self._settings, lag)

    @property
    def away_s(self) -> float:
        """Seconds since it answered last; 0 while it does."""
        return 0.0 if self._away_since is None else time.monotonic() - self._away_since

    def want(self, work: SiteWork) -> None:
        """The same job again keeps what is known of it."""
        known = self._jobs.get(work.unit)
        if known is None or known.work != work:
            self._jobs[work.unit] = _Job(work)
        self._removing.discard(work.unit)
        self._wake.set()

    def unwant(self, unit: str) -> None:
        """Has all of a job removed, now or when the cluster is back."""
        self._jobs.pop(unit, None)
        self._removing.add(unit)
        self._wake.set()

    def status(self, unit: str) -> SiteStatus | None:
        """None: the job is not wanted here, or nothing is known of it yet."""
        job = self._jobs.get(unit)
        if job is None:
            return None
        if job.refused:
            return SiteStatus(job.status.processes if job.status else (), UnitState.FAILED, job.refused)
        return job.status

    async def run(self) -> None:
        """Looks for ever."""
        backoff = _FIRST_BACKOFF_S
        while True:
            self._wake.clear()
            delay = LOOK_EVERY_S
            try:
                with metrics.LOOK_SECONDS.labels(self.site).time():
                    acted = await self._look()
                self._set_away(False)
                self.looks += 1
                backoff = _FIRST_BACKOFF_S
                delay = SOON_S if acted else LOOK_EVERY_S
            except Unavailable as error:
                self._set_away(True)
                log.warning("cluster", cluster=self.site, away_s=round(self.away_s), reason=str(error))
                delay, backoff = backoff, min(2 * backoff, _MAX_BACKOFF_S)
            self._on_news()
            # Not wait_for, which until Python 3.12 may lose a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._wake.wait()

    def _set_away(self, away: bool) -> None:
        metrics.UP.labels(self.site).set(not away)
        if not away:
            self._away_since = None
        elif self._away_since is None:
            self._away_since = time.monotonic()

    async def _look(self) -> bool:
        """One look and what it leads to. Returns whether anything was done."""
        jobs, removing = dict(self._jobs), set(self._removing)
        await self._know_kinds()
        seen = await self._see()
        if KEDA not in self._kinds:
            await self._scaler.look([job.work for job in jobs.values()])
        wanted = [manifest for job in jobs.values() for manifest in self._wanted(job, seen)]
        job_of = {key: job_site(found) for key, found in seen.items()}
        sites = {(job.work.unit, job.work.site) for job in jobs.values()}
        todo = acts(wanted, seen, self._marks, sites, job_of)
        gone = self._removals(removing, seen, job_of)
        await self._act(Acts((*todo.deletes, *gone), todo.applies), seen)
        self._tell(jobs, seen)
        self.present = frozenset(unit for unit, site in job_of.values() if unit and site == self.site)
        self._removing -= removing - self.present
        await self._logs.copy(self._cluster, self._log_files(jobs, seen))
        return bool(todo) or bool(gone)

    async def _know_kinds(self) -> None:
        now = time.monotonic()
        if now < self._kinds_until:
            return
        self._kinds = await self._cluster.kinds()
        self._kinds_until = now + _KINDS_FOR_S
        owner = self._settings.owner
        if owner is not None:
            found = await self._cluster.get(owner.api_version, owner.kind, owner.name)
            if found is None:
                raise Unavailable(f"cluster {self.site} has no {owner.kind} {owner.name}, which is to own what is made")
            self._owner = _reference(found)

    async def _see(self) -> dict[Key, Manifest]:
        """Every object of ours."""
        budget = "policy/v1" if "policy/v1" in self._kinds else "policy/v1beta1"
        kinds = [*_ALWAYS, (budget, "PodDisruptionBudget"), *(kind for kind in _WHERE_KNOWN if kind[0] in self._kinds)]
        labels = common_labels(self._settings.release)
        lists = await asyncio.gather(*(self._cluster.list(version, kind, labels) for version, kind in kinds))
        return {key_of(found): found for page in lists for found in page}

    def _wanted(self, job: _Job, seen: Mapping[Key, Manifest]) -> list[Manifest]:
        if job.refused:
            return []
        anchor = seen.get(("ConfigMap", job.work.base))
        going = anchor is not None and anchor["metadata"].get("deletionTimestamp")
        reference = _reference(anchor) if anchor is not None and not going else None
        around = Around(self._kinds, self._owner, reference, self._scaler.pods(job.work.unit))
        try:
            made = manifests(job.work, self._settings, self._shared, around)
        except Rejected as error:
            job.refused = str(error)
            return []
        # Until the anchor is there, nothing can belong to it.
        return made if reference is not None else made[:1]

    def _removals(
        self, removing: set[str], seen: Mapping[Key, Manifest], job_of: Mapping[Key, tuple[str, str]]
    ) -> list[Key]:
        """What goes with the jobs that go: all but pods, which go with what made them."""
        return [
            key
            for key, found in seen.items()
            if job_of[key][0] in removing
            and job_of[key][1] == self.site
            and key[0] != "Pod"
            and not found["metadata"].get("deletionTimestamp")
        ]

    async def _act(self, todo: Acts, seen: Mapping[Key, Manifest]) -> None:
        for key in todo.deletes:
            kind, name = key
            await self._cluster.delete(seen[key]["apiVersion"], kind, name)
            self._marks.pop(key, None)
            metrics.ACTS.labels(self.site, "delete", kind).inc()
            log.info("deleted", cluster=self.site, kind=kind, name=name)
        for manifest in todo.applies:
            key = key_of(manifest)
            try:
                self._marks[key] = mark_of(await self._cluster.apply(manifest))
            except Rejected as error:
                self._refuse(manifest, str(error))
                continue
            except NoAnswer:
                raise
            except Unavailable as error:
                # One object that can't be made now must not hold up the others, nor other jobs.
                log.warning("not applied", cluster=self.site, kind=key[0], name=key[1], reason=str(error))
                continue
            metrics.ACTS.labels(self.site, "apply", key[0]).inc()
            log.info("applied", cluster=self.site, kind=key[0], name=key[1], again=key in seen)

    def _refuse(self, manifest: Manifest, reason: str) -> None:
        job = self._jobs.get(job_site(manifest)[0])
        if job is not None:
            job.refused = reason

    def _tell(self, jobs: Mapping[str, _Job], seen: Mapping[Key, Manifest]) -> None:
        pods = self._pods(seen)
        for unit, job in jobs.items():
            learners = [
                found
                for key, found in seen.items()
                if key[0] in ("Job", "JobSet") and key[1] == f"{job.work.base}-learner"
            ]
            job.status = job.lives.look(job.work, pods.get(unit, ()), learners, self._scaler.pods(unit))
            if job.status.trouble != job.trouble:
                job.trouble = job.status.trouble
                if job.trouble:
                    log.warning("pods wait", job=unit, cluster=self.site, pods=job.trouble)

    def _pods(self, seen: Mapping[Key, Manifest]) -> dict[str, list[PodSeen]]:
        found: dict[str, list[PodSeen]] = {}
        for key, pod in seen.items():
            unit, site = job_site(pod)
            if key[0] == "Pod" and site == self.site:
                found.setdefault(unit, []).append(read_pod(pod))
        return found

    def _log_files(self, jobs: Mapping[str, _Job], seen: Mapping[Key, Manifest]) -> dict[str, Path]:
        """Each pod's file in its job's folder: by service, as a place's pods are one after another."""
        files: dict[str, Path] = {}
        for unit, pods in self._pods(seen).items():
            if unit not in jobs or jobs[unit].refused:
                continue
            for pod in pods:
                path = jobs[unit].lives.log_path(jobs[unit].work, pod)
                if path is not None:
                    files[pod.name] = path
        return files


def _reference(owner: Manifest) -> Manifest:
    meta = owner["metadata"]
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": meta["name"],
        "uid": meta["uid"],
        # Who deletes the owner waits for nobody.
        "blockOwnerDeletion": False,
        "controller": False,
    }
