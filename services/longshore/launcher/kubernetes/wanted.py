"""What a job shall have in a cluster, before it is written as Kubernetes' objects; and how those are named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from longshore.config import HOME_SITE, JobSpec
from longshore.errors import Rejected
from longshore.launcher.kubernetes.cluster_settings import Service
from longshore.launcher.spec import ProcessSpec

Manifest = dict[str, Any]

DOMAIN = "longshore.dev"
JOB_LABEL = f"{DOMAIN}/job"
SITE_LABEL = f"{DOMAIN}/site"
PROJECT_LABEL = f"{DOMAIN}/project"
HASH_ANNOTATION = f"{DOMAIN}/spec-hash"
MANAGER = "longshore-gateway"
GRPC_PORT = 7443
METRICS_PORT = 9100
OPENAI_PORT = 8443
BROKER_PORT = 6379
_SERVICES = get_args(Service)


@dataclass(frozen=True)
class JobTexts:
    """What of a job's files its pods have: job.json, and the digests of the keys of its agents."""

    job_json: str
    openai_keys: str


@dataclass(frozen=True)
class SiteWork:
    """One job at one site: the processes of each service, all of a kind.

    Example: SiteWork("first-light-4f7c1a", "default", "home", spec, texts, {"actor": (spec0, spec1), ...})
    """

    unit: str
    project: str
    site: str
    spec: JobSpec
    texts: JobTexts
    processes: dict[Service, tuple[ProcessSpec, ...]]

    @property
    def base(self) -> str:
        return base_name(self.unit, self.site)

    def service_of(self, process: str) -> Service | None:
        """Whose process it is. Example: "west-generator-1" -> "generator"; None: none of this site's."""
        for service, specs in self.processes.items():
            if any(spec.name == process for spec in specs):
                return service
        return None


def base_name(unit: str, site: str) -> str:
    """What the names of a job's objects at a site begin with: at most 50 characters, so that 13 are left for more."""
    if site == HOME_SITE:
        return f"ls-{unit}"
    digest = hashlib.sha256(f"{unit}/{site}".encode()).hexdigest()[:8]
    return f"ls-{unit[:38].rstrip('-')}-{digest}"


def site_work(
    unit: str, project: str, spec: JobSpec, texts: JobTexts, specs: Sequence[ProcessSpec]
) -> dict[str, SiteWork]:
    """A job's plan by site. Raises Rejected for a process of no service that has pods."""
    found: dict[str, dict[Service, tuple[ProcessSpec, ...]]] = {}
    brokers = {f"{site.name}-broker": site.name for site in spec.sites}
    for process in specs:
        if process.service not in _SERVICES:
            raise Rejected("service", f"{process.name}: {process.service} has no pods in a cluster")
        site = brokers[process.name] if process.service == "broker" else process.env["LONGSHORE_SITE"]
        services = found.setdefault(site, {})
        service = cast("Service", process.service)
        services[service] = (*services.get(service, ()), process)
    return {site: SiteWork(unit, project, site, spec, texts, services) for site, services in found.items()}


def site_broker_url(unit: str, site: str, namespace: str, password: str) -> str:
    """Where the broker of a rollout site is reached by that site's pods."""
    return f"redis://:{password}@{base_name(unit, site)}-broker.{namespace}.svc:{BROKER_PORT}/0"
