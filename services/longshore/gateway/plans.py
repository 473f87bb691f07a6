"""Lays ready what a job's processes need, and plans them for the launcher that there is."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from redis.asyncio import Redis

from longshore.gateway.config import GatewaySettings
from longshore.gateway.prepare import job_paths, prepare
from longshore.gateway.store import Job
from longshore.gateway.units import Launcher
from longshore.launcher.broker_server import site_brokers
from longshore.launcher.connect import KUBERNETES, WORKERS, connect_launcher
from longshore.launcher.interpreter import generator_python
from longshore.launcher.plan import BrokerCommand, Endpoints, JobPaths, plan_job
from longshore.launcher.spec import ProcessSpec
from longshore.rollout_queue.ledger import Ledger
from longshore.settings import JobFile
from longshore.types import JobRef
from longshore.weights.client import WeightsClient

if TYPE_CHECKING:
    from longshore.launcher.kubernetes.scale import Demand


class Planner:
    """One gateway's launcher, and how jobs are planned for it."""

    def __init__(self, settings: GatewaySettings, client: Redis) -> None:
        """Raises ConfigError when the launcher that is set cannot be used."""
        self._settings = settings
        self._redis = client
        self._connected = connect_launcher(settings.supervisor, self._demand)

    @property
    def launcher(self) -> Launcher:
        return self._connected

    async def close(self) -> None:
        await self._connected.close()

    async def plan(self, job: Job) -> Sequence[ProcessSpec]:
        """Prepares a job (files, key, weight store) and plans its processes.

        Raises:
            Unavailable: the weight store is away.
            Rejected: the job is at a site that is nowhere.
            ConfigError: this machine lacks what it needs.
            OSError: its folder cannot be written.
        """
        settings = self._settings
        paths = job_paths(settings.runs_dir, settings.state_dir, job.id)
        file = await asyncio.to_thread(prepare, job, paths)
        # Images have their own Python, which has vLLM or has not.
        elsewhere = settings.supervisor.startswith((WORKERS, KUBERNETES))
        python = sys.executable if elsewhere else generator_python(file.spec)
        weights = WeightsClient(settings.weights, file.ref, bytes.fromhex(file.learner_public_key))
        try:
            await weights.register_key(file.spec.weights.keep)
        finally:
            await weights.close()
        brokers = await asyncio.to_thread(self._site_brokers, file, paths)
        return plan_job(file, self._endpoints(), paths, brokers, python)

    def _endpoints(self) -> Endpoints:
        """As the job's processes reach them."""
        settings = self._settings
        if not settings.supervisor.startswith(KUBERNETES):
            return Endpoints(settings.broker_url, settings.weights)
        from longshore.launcher.kubernetes.launcher import KubernetesLauncher

        assert isinstance(self._connected, KubernetesLauncher)
        return Endpoints(settings.broker_url, self._connected.settings.home.weights)

    def _site_brokers(self, file: JobFile, paths: JobPaths) -> dict[str, BrokerCommand]:
        sites = [site.name for site in file.spec.sites]
        if not self._settings.supervisor.startswith(KUBERNETES):
            return site_brokers(sites, paths, self._settings.supervisor)
        from longshore.launcher.kubernetes.launcher import KubernetesLauncher
        from longshore.launcher.kubernetes.site_brokers import cluster_brokers

        assert isinstance(self._connected, KubernetesLauncher)
        return cluster_brokers(file.job, sites, paths.signing_key_file.parent, self._connected.settings)

    async def _demand(self, job: str, project: str, site: str) -> Demand:
        """Tickets that a site works on or could: a rollout site takes its own from those that wait at home."""
        from longshore.launcher.kubernetes.scale import Demand

        counts = (await Ledger(self._redis, JobRef(project, job)).counts()).by_site
        own, home = counts.get(site, {}), counts.get("home", {})
        return Demand(queued=home.get("queued", 0), running=own.get("running", 0))
