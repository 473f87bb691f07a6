"""JobSpec -> list of ProcessSpec: the one way in which processes are decided on (law 12).

Pure: opens no file, binds no port (see spec.py for `${PORT:name}`), starts nothing. Compose and Kubernetes back ends
take the same list.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from longshore.launcher.ports import LOOPBACK, placeholder
from longshore.launcher.spec import ProcessSpec, Ready, ReadyKind
from longshore.settings import JobFile

STACK_UNIT = "stack"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Endpoints:
    """Where the shared services are."""

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


@dataclass(frozen=True)
class BrokerCommand:
    """A broker that the stack starts itself; without one, a broker that is there already is used."""

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


def plan_job(job: JobFile, endpoints: Endpoints, paths: JobPaths) -> list[ProcessSpec]:
    """The processes of one job; the learner completes the unit."""
    resources = job.spec.resources
    shared = {"LONGSHORE_JOB_FILE": str(paths.job_file)}
    broker = {"LONGSHORE_BROKER_URL": endpoints.broker_url}
    weights = {"LONGSHORE_WEIGHTS": endpoints.weights}
    learner = {
        "LONGSHORE_RUN_DIR": str(paths.run_dir),
        "LONGSHORE_SIGNING_KEY_FILE": str(paths.signing_key_file),
    }
    actor = {"LONGSHORE_GENERATOR": _grpc("generator-0"), "LONGSHORE_VERIFIER": _grpc("verifier-0")}
    logs, threads = paths.logs, resources.threads
    return [
        _process("learner", "learner", logs, shared | broker | weights | learner, threads, completes_unit=True),
        *(
            _process(f"generator-{index}", "generator", logs, shared | weights, threads)
            for index in range(resources.generators)
        ),
        *(_process(f"verifier-{index}", "verifier", logs, shared) for index in range(resources.verifiers)),
        *(
            _process(f"actor-{index}", "actor", logs, shared | broker | weights | actor)
            for index in range(resources.actors)
        ),
    ]


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
        log = paths.logs / "broker.log"
        plan.insert(0, ProcessSpec("broker", "broker", broker.argv, {}, log, Ready(ReadyKind.REDIS, broker.url)))
    return plan


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
