"""Follows the tickets of the jobs at one cluster, where no KEDA does it.

consumes   tickets by site, from whoever knows the broker     waits for     nothing: it is called once a look
produces   how many pods each scaled service should have
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from longshore.errors import Unavailable
from longshore.launcher.kubernetes import metrics
from longshore.launcher.kubernetes.cluster_settings import ClusterSettings, Service
from longshore.launcher.kubernetes.scale import Demand, Steady, pods_for
from longshore.launcher.kubernetes.wanted import SiteWork

log = structlog.get_logger()

LOOK_EVERY_S = 10.0
_SCALED: tuple[Service, ...] = ("actor", "generator")

# Tickets of (job, project, site). Raises Unavailable.
Lag = Callable[[str, str, str], Awaitable[Demand]]


class Scaler:
    """Of one cluster. A service whose tickets are not known keeps the pods that it has."""

    def __init__(self, site: str, settings: ClusterSettings, lag: Lag) -> None:
        self._site = site
        self._settings = settings
        self._lag = lag
        self._pods: dict[str, dict[Service, int]] = {}
        self._steady: dict[tuple[str, Service], Steady] = {}
        self._next = 0.0

    def pods(self, unit: str) -> Mapping[Service, int]:
        """Of the services of a job that are scaled."""
        return self._pods.get(unit, {})

    async def look(self, works: Sequence[SiteWork]) -> None:
        """Asks for the tickets of each job, now and then."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LOOK_EVERY_S
        units = {work.unit for work in works}
        self._forget(units)
        for work in works:
            scaled = [name for name in _SCALED if name in work.processes and self._settings.of(name).scale is not None]
            if not scaled:
                continue
            try:
                demand = await self._lag(work.unit, work.project, self._site)
            except Unavailable as error:
                log.warning("not scaled", job=work.unit, cluster=self._site, reason=str(error))
                continue
            for service in scaled:
                self._scale(work, service, demand, now)

    def _forget(self, units: set[str]) -> None:
        """Jobs that are not wanted any more."""
        for unit, service in [key for key in self._steady if key[0] not in units]:
            del self._steady[unit, service]
            self._pods.pop(unit, None)
            metrics.PODS_WANTED.remove(self._site, service, unit)

    def _scale(self, work: SiteWork, service: Service, demand: Demand, now: float) -> None:
        bounds = self._settings.of(service).scale
        assert bounds is not None
        resources = work.spec.resources_at(self._site)
        each = resources.rollouts_per_actor if service == "actor" else resources.generator_slots
        steady = self._steady.setdefault((work.unit, service), Steady())
        pods = steady.want(pods_for(demand, each, bounds), now)
        known = self._pods.setdefault(work.unit, {})
        if known.get(service) != pods:
            log.info("scaled", job=work.unit, cluster=self._site, service=service, pods=pods, tickets=demand.tickets)
        known[service] = pods
        metrics.PODS_WANTED.labels(self._site, service, work.unit).set(pods)
