"""The routes that show what a job does: metrics, rollouts, sites. Decides nothing itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query

from longshore.api_types import RolloutPage, Series, SiteList, WholeRollout
from longshore.config import JobSpec
from longshore.gateway.auth import ViewedJob
from longshore.gateway.books import Books
from longshore.gateway.responses import READS
from longshore.gateway.rollout_views import KEY, Rollouts
from longshore.gateway.series import read_series
from longshore.gateway.sites import site_views
from longshore.gateway.units import Units

MAX_POINTS = 10_000
MAX_ROLLOUTS = 1000
_MAX_STEP = 10**9
# A long job's metrics are a large file; more readers at once would only make each slower.
_MAX_READERS = 2


class DataRoutes:
    """The routes over a job's files, its broker and its units."""

    def __init__(self, rollouts: Rollouts, books: Books, units: Units, runs_dir: Path) -> None:
        self._rollouts = rollouts
        self._books = books
        self._units = units
        self._runs_dir = runs_dir
        self._readers = asyncio.Semaphore(_MAX_READERS)

    def add_to(self, router: APIRouter) -> None:
        """Adds every route, below /jobs/{job_id}."""
        job = "/jobs/{job_id}"
        reads: dict[str, Any] = {"methods": ["GET"], "tags": ["data"], "responses": READS}
        add = router.add_api_route
        add(job + "/metrics", self.metrics, operation_id="metrics", **reads)
        add(job + "/rollouts", self.rollouts, operation_id="rollouts", **reads)
        add(job + "/rollouts/{rollout_id}", self.rollout, operation_id="rollout", **reads)
        add(job + "/sites", self.sites, operation_id="sites", **reads)

    async def metrics(
        self,
        job: ViewedJob,
        name: Annotated[list[str] | None, Query(max_length=100, description="absent: all of them")] = None,
        after: Annotated[int, Query(ge=0, le=_MAX_STEP, description="train steps after this one")] = 0,
        points: Annotated[int, Query(ge=1, le=MAX_POINTS, description="the most train steps, evenly spread")] = 1000,
    ) -> Series:
        """What the learner measured at each train step. 404: no step has such a metric."""
        async with self._readers:
            path = self._runs_dir / job.id / "metrics.jsonl"
            return await asyncio.to_thread(read_series, path, name or [], after, points)

    async def rollouts(
        self,
        job: ViewedJob,
        limit: Annotated[int, Query(ge=1, le=MAX_ROLLOUTS)] = 100,
        after: Annotated[str | None, Query(pattern=KEY, description="`next` of the page before")] = None,
        state: Annotated[str | None, Query(max_length=40)] = None,
        site: Annotated[str | None, Query(max_length=64)] = None,
        step: Annotated[int | None, Query(ge=0, le=_MAX_STEP, description="the batch of this train step")] = None,
    ) -> RolloutPage:
        """The rollouts that the broker has (from queued to delivered), or with `step` those of one train step."""
        async with self._readers:
            return await self._rollouts.page(job, limit, after, state, site, step)

    async def rollout(self, job: ViewedJob, rollout_id: str) -> WholeRollout:
        """One rollout with its tokens, log-probs and verdicts, for as long as the broker has it."""
        async with self._readers:
            return await self._rollouts.whole(job, rollout_id)

    async def sites(self, job: ViewedJob) -> SiteList:
        """Each site of the job: its processes, whether all are ready, where its tickets are."""
        unit = self._units.get(job.id)
        names = [site.name for site in JobSpec.model_validate(job.spec).sites]
        by_site = (await self._books.ledger(job))["by_site"]
        return {"sites": site_views(names, unit.processes if unit else (), by_site)}
