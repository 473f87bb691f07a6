from __future__ import annotations

import sys
from pathlib import Path

import pytest

from longshore.config import JobSpec
from longshore.launcher.plan import BrokerCommand, Endpoints, JobPaths, StackPaths, plan_job, plan_stack
from longshore.launcher.spec import ProcessSpec, Ready, ReadyKind
from longshore.settings import JobFile

ENDPOINTS = Endpoints("unix:///s/broker.sock", "127.0.0.1:7001")
PATHS = JobPaths(Path("/runs/j-1"), Path("/state/jobs/j-1/learner.key"))
STACK = StackPaths(Path("/state"), Path("/runs"), "unix:/s/supervisor.sock")


def job(**resources: int) -> JobFile:
    spec = JobSpec.model_validate(
        {
            "name": "j",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 3},
            "resources": resources,
        }
    )
    return JobFile(project="default", job="j-1", spec=spec, learner_public_key="ab" * 32)


def by_name(plan: list[ProcessSpec]) -> dict[str, ProcessSpec]:
    assert len({spec.name for spec in plan}) == len(plan)
    return {spec.name: spec for spec in plan}


def test_a_job_has_one_learner_generator_and_verifier_and_its_actors() -> None:
    plan = by_name(plan_job(job(actors=3), ENDPOINTS, PATHS))
    assert list(plan) == ["learner", "generator-0", "verifier-0", "actor-0", "actor-1", "actor-2"]
    assert [spec.name for spec in plan.values() if spec.completes_unit] == ["learner"]
    for spec in plan.values():
        assert spec.argv == (sys.executable, "-m", "longshore", "serve", spec.service)
        assert spec.log_path == Path(f"/runs/j-1/logs/{spec.name}.log")
        assert spec.env["LONGSHORE_JOB_FILE"] == "/runs/j-1/job.json"


def test_each_process_is_told_what_the_architecture_says() -> None:
    plan = by_name(plan_job(job(), ENDPOINTS, PATHS))
    told = {name: {key.removeprefix("LONGSHORE_") for key in spec.env} for name, spec in plan.items()}
    common = {"NAME", "LISTEN", "METRICS_LISTEN", "JOB_FILE"}
    assert told["learner"] >= common | {"BROKER_URL", "WEIGHTS", "RUN_DIR", "SIGNING_KEY_FILE"}
    assert told["generator-0"] >= common | {"WEIGHTS"}
    assert told["verifier-0"] >= common
    assert told["actor-0"] >= common | {"BROKER_URL", "GENERATOR", "VERIFIER", "WEIGHTS"}
    # The signing key is the learner's alone.
    assert not any("SIGNING_KEY_FILE" in told[name] for name in told if name != "learner")


def test_actors_are_sent_to_the_ports_that_generator_and_verifier_listen_on() -> None:
    plan = by_name(plan_job(job(), ENDPOINTS, PATHS))
    for name, variable in (("generator-0", "GENERATOR"), ("verifier-0", "VERIFIER")):
        listen = plan[name].env["LONGSHORE_LISTEN"]
        assert listen == f"127.0.0.1:${{PORT:{name}.grpc}}"
        assert plan[name].ready == Ready(ReadyKind.GRPC, listen)
        assert plan["actor-1"].env[f"LONGSHORE_{variable}"] == listen


def test_threads_are_for_learner_and_generator() -> None:
    plan = by_name(plan_job(job(threads=4), ENDPOINTS, PATHS))
    widths = {name: spec.env["OMP_NUM_THREADS"] for name, spec in plan.items()}
    assert widths == {"learner": "4", "generator-0": "4", "verifier-0": "1", "actor-0": "1", "actor-1": "1"}


def test_the_plan_is_the_same_every_time() -> None:
    assert plan_job(job(), ENDPOINTS, PATHS) == plan_job(job(), ENDPOINTS, PATHS)


def test_the_stack_starts_a_broker_of_its_own_first() -> None:
    broker = BrokerCommand(("valkey-server", "--port", "0"), "unix:///s/broker.sock")
    plan = plan_stack(broker, STACK, 8080, jobs_since=5.5)
    assert [spec.name for spec in plan] == ["broker", "weights", "gateway"]
    assert plan[0].argv == broker.argv
    assert plan[0].ready == Ready(ReadyKind.REDIS, broker.url)
    gateway = plan[2].env
    assert gateway["LONGSHORE_HTTP_LISTEN"] == "127.0.0.1:8080"
    assert gateway["LONGSHORE_BROKER_URL"] == broker.url
    assert gateway["LONGSHORE_WEIGHTS"] == plan[1].env["LONGSHORE_LISTEN"]
    assert gateway["LONGSHORE_JOBS_SINCE"] == "5.5"


@pytest.mark.parametrize("url", ["redis://host:6379/0", "unix:///x.sock"])
def test_a_broker_that_is_there_is_not_started(url: str) -> None:
    plan = plan_stack(url, STACK, 8080)
    assert [spec.name for spec in plan] == ["weights", "gateway"]
    assert plan[1].env["LONGSHORE_BROKER_URL"] == url
