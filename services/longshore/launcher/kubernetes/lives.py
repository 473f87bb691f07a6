"""What a site's pods say of a job: its processes' states, and whether it has ended. Pure: it is shown what is seen.

A process of the plan is a place that pods take one after another: actor-0 is the oldest actor's pod; a pod that is
replaced hands its name on, and counts as a restart. When one has died too often is said by the same rules as on a
laptop (launcher/deaths.py), of what the cluster tells of each container's last death.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from longshore.launcher.deaths import Deaths, Rules
from longshore.launcher.kubernetes.cluster_settings import Service
from longshore.launcher.kubernetes.wanted import Manifest, SiteWork
from longshore.launcher.last_words import gist
from longshore.launcher.spec import ProcessState, ProcessStatus, UnitState

_RULES = Rules()
_COMPONENT = "app.kubernetes.io/component"
# Reasons of a container that waits which no waiting mends.
_HOPELESS = frozenset({"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError", "RunContainerError"})


@dataclass(frozen=True)
class Death:
    """The last one of a container; `code` as of a subprocess: negative for a signal."""

    code: int
    lived_s: float
    words: str


@dataclass(frozen=True)
class PodSeen:
    """What matters of a pod, which has one container."""

    uid: str
    name: str
    service: str
    born: str
    going: bool
    ready: bool
    # Its start-up probe has passed.
    started: bool
    restarts: int
    death: Death | None
    ended: bool
    # Why its container waits, or why it has no node.
    waits: str


def read_pod(pod: Manifest) -> PodSeen:
    """Of a pod as the API tells it."""
    meta, status = pod["metadata"], pod.get("status") or {}
    found = (status.get("containerStatuses") or [{}])[0]
    state, last = found.get("state") or {}, found.get("lastState") or {}
    now, before = state.get("terminated"), last.get("terminated")
    return PodSeen(
        uid=meta["uid"],
        name=meta["name"],
        service=(meta.get("labels") or {}).get(_COMPONENT, ""),
        born=meta.get("creationTimestamp", ""),
        going=bool(meta.get("deletionTimestamp")),
        ready=bool(found.get("ready")),
        started=bool(found.get("started")),
        restarts=int(found.get("restartCount", 0)),
        death=_death(now or before),
        ended=bool(now) and status.get("phase") in ("Succeeded", "Failed"),
        waits=_waits(status, state),
    )


def _waits(status: Manifest, state: Manifest) -> str:
    waiting = state.get("waiting") or {}
    if waiting.get("reason"):
        return ": ".join(part for part in (waiting["reason"], waiting.get("message", "")) if part)
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"
    return ""


def _death(terminated: Mapping[str, Any] | None) -> Death | None:
    if not terminated:
        return None
    code = int(terminated.get("exitCode", 0))
    began, ended = terminated.get("startedAt"), terminated.get("finishedAt")
    lived = (_time(ended) - _time(began)).total_seconds() if began and ended else 0.0
    words = gist(terminated.get("message") or "")
    if terminated.get("reason") == "OOMKilled":
        words = "it took more memory than its limit"
    return Death(code if code <= 128 else 128 - code, lived, words)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


@dataclass
class _Life:
    """One pod over the looks at it."""

    restarts: int
    was_up: bool = False
    deaths: Deaths = field(default_factory=Deaths)
    hopeless: str = ""

    def look(self, pod: PodSeen) -> None:
        died = pod.restarts - self.restarts
        if died > 0 and pod.death is not None:
            # Of several since the last look only the last is known; the others were no longer.
            for number in range(died):
                self.deaths.count(self.was_up and number == 0, pod.death.code, pod.death.lived_s, _RULES)
            self.was_up = False
        self.restarts = pod.restarts
        self.was_up = self.was_up or pod.ready or pod.started
        if pod.ready:
            self.deaths.failed_starts = 0
        self.hopeless = self.deaths.hopeless(_RULES)


@dataclass
class _Place:
    """One process of the plan."""

    uid: str = ""
    # Restarts of the pods that had the place before, and one for each that came after another.
    before: int = 0
    restarts: int = 0


@dataclass(frozen=True)
class SiteStatus:
    """`end` is None while the job runs there. `trouble`: what keeps pods from starting, each once."""

    processes: tuple[ProcessStatus, ...]
    end: UnitState | None = None
    message: str = ""
    trouble: tuple[str, ...] = ()


class SiteLives:
    """Of one job at one site. It forgets when the gateway ends, and then counts deaths anew."""

    def __init__(self) -> None:
        self._lives: dict[str, _Life] = {}
        self._places: dict[Service, list[_Place]] = {}
        self._end: tuple[UnitState, str] | None = None

    def look(
        self, work: SiteWork, pods: Iterable[PodSeen], learner_jobs: Iterable[Manifest], counts: Mapping[Service, int]
    ) -> SiteStatus:
        """
        Args:
            pods: of the job at the site.
            learner_jobs: its Job, or JobSet.
            counts: pods that are wanted, of services that are scaled.
        """
        standing = sorted((pod for pod in pods if not pod.going), key=lambda pod: (pod.born, pod.name))
        self._follow(standing)
        if self._end is None:
            self._end = self._ended(work, standing, learner_jobs)
        processes: list[ProcessStatus] = []
        for service, specs in work.processes.items():
            own = [pod for pod in standing if pod.service == service]
            count = max(counts.get(service, len(specs)), 1)
            places = self._settle(service, own, count)
            for index, place in enumerate(places):
                name, path = _named(work, service, index)
                pod = next((pod for pod in own if pod.uid == place.uid), None)
                processes.append(_status(name, pod, place, str(path)))
        trouble = tuple(dict.fromkeys(f"{pod.name}: {pod.waits}" for pod in standing if pod.waits))
        end, message = self._end or (None, "")
        return SiteStatus(tuple(processes), end, message, trouble)

    def log_path(self, work: SiteWork, pod: PodSeen) -> Path | None:
        """Where a pod's lines go, by the place that it has; None for one that has none."""
        for service, places in self._places.items():
            for index, place in enumerate(places):
                if place.uid == pod.uid and service in work.processes:
                    return _named(work, service, index)[1]
        return None

    def _follow(self, pods: list[PodSeen]) -> None:
        self._lives = {pod.uid: self._lives.get(pod.uid) or _Life(pod.restarts) for pod in pods}
        for pod in pods:
            self._lives[pod.uid].look(pod)

    def _settle(self, service: Service, pods: list[PodSeen], count: int) -> list[_Place]:
        """Gives each pod a place; one that is new takes the first that is free."""
        places = self._places.setdefault(service, [])
        places += [_Place() for _ in range(len(places), count)]
        here = {pod.uid: pod for pod in pods}
        waiting = [pod for pod in pods if all(place.uid != pod.uid for place in places)]
        for place in places:
            if place.uid not in here and waiting:
                had = bool(place.uid)
                place.before += place.restarts + had
                place.uid = waiting.pop(0).uid
            if place.uid in here:
                place.restarts = here[place.uid].restarts
        # Places of pods that were scaled away go; those above the count that still have a pod stay until it has gone.
        while len(places) > count and places[-1].uid not in here:
            places.pop()
        return places

    def _ended(
        self, work: SiteWork, pods: list[PodSeen], learner_jobs: Iterable[Manifest]
    ) -> tuple[UnitState, str] | None:
        for job in learner_jobs:
            conditions = (job.get("status") or {}).get("conditions") or ()
            kinds = {item["type"]: item for item in conditions if item.get("status") == "True"}
            if "Complete" in kinds or "Completed" in kinds:
                return UnitState.SUCCEEDED, ""
            if "Failed" in kinds:
                return UnitState.FAILED, f"the learner's job failed: {kinds['Failed'].get('message', '')}"
        for pod in pods:
            life = self._lives[pod.uid]
            reason = pod.waits.partition(":")[0]
            if reason in _HOPELESS:
                return UnitState.FAILED, f"{pod.name} at {work.site} cannot start: {pod.waits}"
            if life.hopeless and pod.death is not None:
                how = f"exit code {pod.death.code}" if pod.death.code >= 0 else f"signal {-pod.death.code}"
                said = f"; it said last: {pod.death.words}" if pod.death.words else ""
                return UnitState.FAILED, f"{pod.name} at {work.site} died {life.hopeless} ({how}){said}"
        return None


def _named(work: SiteWork, service: Service, index: int) -> tuple[str, Path]:
    """Name and log of a place; of those beyond the plan's, as the plan would have named them."""
    specs = work.processes[service]
    name = specs[index].name if index < len(specs) else f"{specs[0].name.removesuffix('-0')}-{index}"
    return name, specs[0].log_path.parent / f"{name}.log"


def _status(name: str, pod: PodSeen | None, place: _Place, log_path: str) -> ProcessStatus:
    restarts = place.before + place.restarts
    if pod is None:
        state = ProcessState.BACKOFF if place.uid else ProcessState.STARTING
        return ProcessStatus(name, state, 0, restarts, None, log_path)
    state = ProcessState.STARTING
    if pod.ended:
        state = ProcessState.EXITED
    elif pod.ready:
        state = ProcessState.READY
    elif pod.death is not None and not pod.started:
        state = ProcessState.BACKOFF
    return ProcessStatus(name, state, 0, restarts, pod.death.code if pod.death else None, log_path)
