"""JobSpec -> list of ProcessSpec: the one way in which processes are decided on (law 12).

Pure: opens no file, binds no port (see spec.py for `${PORT:name}`), starts nothing. Compose and Kubernetes back ends
take the same list.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from longshore.config import HOME_SITE, SiteSpec
from longshore.launcher.ports import LOOPBACK, placeholder
from longshore.launcher.spec import ProcessSpec, Ready, ReadyKind
from longshore.settings import JobFile

STACK_UNIT = "stack"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Endpoints:
    """Where the services are that a job's processes at one site share."""

    broker_url: str
    weights: str


@dataclass(frozen=True)
class JobPaths:
    """A job's files: `run_dir` is what a person reads, the key is in the state directory."""

    run_dir: Path
    signing_key_file: Path

    @property
    def job_file(self) -> Path:
        return self.run_dir / "job.json"

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    @property
    def openai_key_file(self) -> Path:
        """The job's own key of its generators' OpenAI-compatible interface, for whoever may read the run directory."""
        return self.run_dir / "openai.key"

    @property
    def openai_keys_file(self) -> Path:
        """Names and digests of the keys that the generators let in; they see nothing of the state directory."""
        return self.run_dir / "openai.keys"

    def openai_url_file(self, generator: str) -> Path:
        return self.run_dir / f"openai-{generator}.url"

    def site_dir(self, site: str) -> Path:
        """What a site's own disk would hold; the home site's is the run directory."""
        return self.run_dir if site == HOME_SITE else self.run_dir / "sites" / site

    def spool_dir(self, site: str, process: str) -> Path:
        return self.site_dir(site) / "spool" / process

    def blobs_url(self, site: str) -> str:
        return (self.site_dir(site) / "blobs").as_uri()

    def generators_file(self, site: str) -> Path:
        """Where a person lists generators beside the job's own, one address a line, while it runs."""
        return self.site_dir(site) / "generators.txt"

    def broker_dir(self, site: str) -> Path:
        return self.site_dir(site) / "broker"


@dataclass(frozen=True)
class BrokerCommand:
    """A broker that the launcher starts itself; without one, a broker that is there already is used."""

    argv: tuple[str, ...]
    url: str


@dataclass(frozen=True)
class StackPaths:
    """Where the shared services keep things."""

    state_dir: Path
    runs_dir: Path
    supervisor: str

    @property
    def logs(self) -> Path:
        return self.state_dir / "logs"

    @property
    def api_key_file(self) -> Path:
        return self.state_dir / "api.key"


NO_BROKERS: Mapping[str, BrokerCommand] = MappingProxyType({})


def plan_job(
    job: JobFile,
    endpoints: Endpoints,
    paths: JobPaths,
    site_brokers: Mapping[str, BrokerCommand] = NO_BROKERS,
    generator_python: str = sys.executable,
) -> list[ProcessSpec]:
    """The processes of one job; the learner completes the unit.

    Args:
        site_brokers: how to start the broker of each rollout site of the job.
        generator_python: the interpreter of the job's generators, where that is not the others' (see interpreter.py).
    """
    env = {
        **_shared(paths, HOME_SITE),
        "LONGSHORE_WEIGHTS": endpoints.weights,
        "LONGSHORE_BROKER_URL": endpoints.broker_url,
        "LONGSHORE_RUN_DIR": str(paths.run_dir),
        "LONGSHORE_SIGNING_KEY_FILE": str(paths.signing_key_file),
        "LONGSHORE_BLOBS_URL": paths.blobs_url(HOME_SITE),
    }
    learner = _process("learner", "learner", paths.logs, env, job.spec.resources.threads, completes_unit=True)
    plan = [learner, *_rollout_makers(job, endpoints, paths, HOME_SITE)]
    for site in job.spec.sites:
        plan += _plan_site(job, site, endpoints, paths, site_brokers[site.name])
    return [_run_by(process, generator_python) if process.service == "generator" else process for process in plan]


def _run_by(process: ProcessSpec, python: str) -> ProcessSpec:
    return replace(process, argv=(python, *process.argv[1:]))


def _plan_site(
    job: JobFile, site: SiteSpec, endpoints: Endpoints, paths: JobPaths, broker: BrokerCommand
) -> list[ProcessSpec]:
    """A rollout site, as if it were on a machine of its own: only its relay knows the home broker."""
    name = f"{site.name}-relay"
    resources = job.spec.resources_at(site.name)
    relay = {
        **_shared(paths, site.name),
        "LONGSHORE_HOME_WEIGHTS": endpoints.weights,
        "LONGSHORE_WEIGHTS_DIR": str(paths.site_dir(site.name) / "weights"),
        "LONGSHORE_BROKER_URL": broker.url,
        "LONGSHORE_HOME_BROKER_URL": endpoints.broker_url,
        "LONGSHORE_BLOBS_URL": paths.blobs_url(site.name),
        "LONGSHORE_HOME_BLOBS_URL": paths.blobs_url(HOME_SITE),
        "LONGSHORE_SPOOL_DIR": str(paths.spool_dir(site.name, name)),
        "LONGSHORE_ALLOWANCE": str(site.allowance or 2 * resources.actors * resources.rollouts_per_actor),
    }
    return [
        _broker(f"{site.name}-broker", broker, paths.logs),
        _process(name, "relay", paths.logs, relay),
        # The site's generators know the relay alone: each version crosses the link once.
        *_rollout_makers(job, Endpoints(broker.url, _grpc(name)), paths, site.name),
    ]


def _rollout_makers(job: JobFile, endpoints: Endpoints, paths: JobPaths, site: str) -> list[ProcessSpec]:
    """Generators, verifiers and actors of a site, which know the site's own endpoints."""
    resources, logs = job.spec.resources_at(site), paths.logs
    if not resources.actors:
        return []
    prefix = "" if site == HOME_SITE else f"{site}-"
    shared = {**_shared(paths, site), "LONGSHORE_WEIGHTS": endpoints.weights}
    generators = [f"{prefix}generator-{index}" for index in range(resources.generators)]
    actor = {
        **shared,
        "LONGSHORE_BROKER_URL": endpoints.broker_url,
        "LONGSHORE_BLOBS_URL": paths.blobs_url(site),
        "LONGSHORE_GENERATOR": ",".join([*map(_grpc, generators), paths.generators_file(site).as_uri()]),
        "LONGSHORE_VERIFIER": _grpc(f"{prefix}verifier-0"),
    }
    verifiers = [f"{prefix}verifier-{index}" for index in range(resources.verifiers)]
    actors = [f"{prefix}actor-{index}" for index in range(resources.actors)]
    return [
        *(
            _process(name, "generator", logs, {**shared, **_openai(name, paths)}, resources.threads)
            for name in generators
        ),
        *(_process(name, "verifier", logs, shared) for name in verifiers),
        *(
            _process(name, "actor", logs, {**actor, "LONGSHORE_SPOOL_DIR": str(paths.spool_dir(site, name))})
            for name in actors
        ),
    ]


def _openai(generator: str, paths: JobPaths) -> dict[str, str]:
    """Where a generator serves agents that were written for OpenAI's client."""
    return {
        "LONGSHORE_OPENAI_LISTEN": f"{LOOPBACK}:{placeholder(f'{generator}.openai')}",
        "LONGSHORE_OPENAI_KEYS_FILE": str(paths.openai_keys_file),
        "LONGSHORE_OPENAI_URL_FILE": str(paths.openai_url_file(generator)),
    }


def _shared(paths: JobPaths, site: str) -> dict[str, str]:
    """What every process of a job is told."""
    return {"LONGSHORE_JOB_FILE": str(paths.job_file), "LONGSHORE_SITE": site}


def plan_stack(
    broker: BrokerCommand | str, paths: StackPaths, http_port: int, jobs_since: float = 0.0
) -> list[ProcessSpec]:
    """The shared services of one machine, in the order in which they are needed.

    Args:
        broker: how to start one, or the URL of one that runs.
        http_port: port of the REST API on loopback.
        jobs_since: Unix seconds; the gateway leaves jobs created earlier alone.
    """
    url = broker if isinstance(broker, str) else broker.url
    gateway = {
        "LONGSHORE_HTTP_LISTEN": f"{LOOPBACK}:{http_port}",
        "LONGSHORE_DATABASE_URL": f"sqlite+aiosqlite:///{paths.state_dir / 'longshore.db'}",
        "LONGSHORE_RUNS_DIR": str(paths.runs_dir),
        "LONGSHORE_STATE_DIR": str(paths.state_dir),
        "LONGSHORE_BROKER_URL": url,
        "LONGSHORE_WEIGHTS": _grpc("weights"),
        "LONGSHORE_SUPERVISOR": paths.supervisor,
        "LONGSHORE_API_KEY_FILE": str(paths.api_key_file),
        "LONGSHORE_JOBS_SINCE": repr(jobs_since),
    }
    store = {"LONGSHORE_STORE_URL": (paths.state_dir / "weights").as_uri()}
    plan = [
        _process("weights", "weights", paths.logs, store),
        _process("gateway", "gateway", paths.logs, gateway),
    ]
    if isinstance(broker, BrokerCommand):
        plan.insert(0, _broker("broker", broker, paths.logs))
    return plan


def _broker(name: str, command: BrokerCommand, logs: Path) -> ProcessSpec:
    return ProcessSpec(name, "broker", command.argv, {}, logs / f"{name}.log", Ready(ReadyKind.REDIS, command.url))


def _grpc(name: str) -> str:
    return f"{LOOPBACK}:{placeholder(f'{name}.grpc')}"


def _process(
    name: str, service: str, logs: Path, env: dict[str, str], threads: int = 1, *, completes_unit: bool = False
) -> ProcessSpec:
    common = {
        "LONGSHORE_NAME": name,
        "LONGSHORE_LISTEN": _grpc(name),
        "LONGSHORE_METRICS_LISTEN": f"{LOOPBACK}:{placeholder(f'{name}.metrics')}",
        # Many small processes share the cores: each is given its width, or every one would take all of them.
        **dict.fromkeys(_THREAD_VARIABLES, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return ProcessSpec(
        name=name,
        service=service,
        argv=(sys.executable, "-m", "longshore", "serve", service),
        env=common | env,
        log_path=logs / f"{name}.log",
        ready=Ready(ReadyKind.GRPC, _grpc(name)),
        completes_unit=completes_unit,
    )
