"""Which queued jobs get a place now: quotas of projects, the room there is, and fairness between projects. Pure.

A job takes a place of its project's quotas (jobs, generators, GPUs) from when it is started until it ends or is paused.
Of the projects that wait, the one that uses the smallest share of the room is served next, each in its own order of
waiting; so one project's thousand jobs do not keep another's single job waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longshore.config import JobSpec


@dataclass(frozen=True)
class Use:
    """What jobs take. Example: Use(jobs=1, generators=4, gpus=5)"""

    jobs: int = 0
    generators: int = 0
    gpus: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(self.jobs + other.jobs, self.generators + other.generators, self.gpus + other.gpus)


@dataclass(frozen=True)
class Limits:
    """The most of each; None: no limit."""

    jobs: int | None = None
    generators: int | None = None
    gpus: int | None = None

    def breach(self, use: Use) -> str | None:
        """Which limit is exceeded, in words; None: none is."""
        for name in ("jobs", "generators", "gpus"):
            limit, value = getattr(self, name), getattr(use, name)
            if limit is not None and value > limit:
                return f"{value} {name}, and at most {limit} are allowed"
        return None

    def share(self, use: Use) -> float:
        """The largest part of any limit that is used; without limits the number of jobs."""
        parts = [
            getattr(use, name) / limit
            for name in ("jobs", "generators", "gpus")
            if (limit := getattr(self, name)) is not None and limit > 0
        ]
        return max(parts) if parts else float(use.jobs)


@dataclass(frozen=True)
class Wish:
    """A job that waits for a place, or has one. `since`: when it began to wait, in Unix seconds."""

    job: str
    project: str
    since: float
    needs: Use


NO_LIMITS = Limits()


def needs_of(spec: JobSpec) -> Use:
    """What a job takes: the generators of each site that has actors; the GPUs of its learner, and of vLLM's engines."""
    sites = [spec.resources_at(name) for name in ("home", *(site.name for site in spec.sites))]
    generators = sum(resources.generators for resources in sites if resources.actors)
    gpus = spec.train.processes if spec.train.compute.device == "cuda" else 0
    if spec.generator.engine == "vllm":
        gpus += generators * spec.generator.tensor_parallel
    return Use(1, generators, gpus)


def used_by_project(placed: Sequence[Wish]) -> dict[str, Use]:
    """What the jobs that have a place take, by project."""
    used: dict[str, Use] = {}
    for wish in placed:
        used[wish.project] = used.get(wish.project, Use()) + wish.needs
    return used


def place(waiting: Sequence[Wish], placed: Sequence[Wish], quotas: Mapping[str, Limits], room: Limits) -> list[str]:
    """The jobs that get a place now, in order.

    A project whose first job does not fit its quotas waits for its own jobs to end; it does not hold up the others. A
    job that does not fit the room that is left holds up everybody behind it, or a large one would wait for ever.
    """
    queues: dict[str, list[Wish]] = {}
    for wish in sorted(waiting, key=lambda wish: (wish.since, wish.job)):
        queues.setdefault(wish.project, []).append(wish)
    used = used_by_project(placed)
    total = sum(used.values(), Use())
    chosen: list[str] = []
    while queues:
        project = min(queues, key=lambda name: (room.share(used.get(name, Use())), queues[name][0].since, name))
        wish = queues[project][0]
        own = used.get(project, Use()) + wish.needs
        if quotas.get(project, NO_LIMITS).breach(own):
            del queues[project]
            continue
        if room.breach(total + wish.needs):
            break
        chosen.append(wish.job)
        used[project], total = own, total + wish.needs
        queues[project].pop(0)
        if not queues[project]:
            del queues[project]
    return chosen
