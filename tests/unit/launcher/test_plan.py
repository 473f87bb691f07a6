from __future__ import annotations

import sys
from pathlib import Path

import pytest

from longshore.actor.addresses import parse_entries
from longshore.config import JobSpec
from longshore.launcher.plan import BrokerCommand, Endpoints, JobPaths, StackPaths, plan_job, plan_stack
from longshore.launcher.spec import ProcessSpec, Ready, ReadyKind
from longshore.settings import JobFile

ENDPOINTS = Endpoints("unix:///s/broker.sock", "127.0.0.1:7001")
PATHS = JobPaths(Path("/runs/j-1"), Path("/state/jobs/j-1/learner.key"))
STACK = StackPaths(Path("/state"), Path("/runs"), "unix:/s/supervisor.sock")


def job(sites: list[dict[str, object]] | None = None, **resources: int) -> JobFile:
    spec = JobSpec.model_validate(
        {
            "name": "j",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 3},
            "resources": resources,
            "sites": sites or [],
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
    common = {"NAME", "LISTEN", "METRICS_LISTEN", "JOB_FILE", "SITE"}
    assert told["learner"] >= common | {"BROKER_URL", "WEIGHTS", "RUN_DIR", "SIGNING_KEY_FILE", "BLOBS_URL"}
    assert told["generator-0"] >= common | {"WEIGHTS", "OPENAI_LISTEN", "OPENAI_KEYS_FILE", "OPENAI_URL_FILE"}
    assert told["verifier-0"] >= common
    assert told["actor-0"] >= common | {
        *("BROKER_URL", "GENERATOR", "VERIFIER", "WEIGHTS", "SPOOL_DIR", "BLOBS_URL"),
    }
    # Each generator has an address of its own, and knows digests of keys alone.
    assert plan["generator-0"].env["LONGSHORE_OPENAI_LISTEN"] == "127.0.0.1:${PORT:generator-0.openai}"
    assert plan["generator-0"].env["LONGSHORE_OPENAI_KEYS_FILE"] == "/runs/j-1/openai.keys"
    assert plan["generator-0"].env["LONGSHORE_OPENAI_URL_FILE"] == "/runs/j-1/openai-generator-0.url"
    # The signing key is the learner's alone.
    assert not any("SIGNING_KEY_FILE" in told[name] for name in told if name != "learner")


def test_actors_are_sent_to_the_ports_that_generator_and_verifier_listen_on() -> None:
    plan = by_name(plan_job(job(), ENDPOINTS, PATHS))
    for name, variable in (("generator-0", "GENERATOR"), ("verifier-0", "VERIFIER")):
        listen = plan[name].env["LONGSHORE_LISTEN"]
        assert listen == f"127.0.0.1:${{PORT:{name}.grpc}}"
        assert plan[name].ready == Ready(ReadyKind.GRPC, listen)
        assert plan["actor-1"].env[f"LONGSHORE_{variable}"].split(",")[0] == listen


def test_actors_know_all_generators_of_their_site_and_those_that_a_person_lists_there() -> None:
    sites: list[dict[str, object]] = [{"name": "west"}, {"name": "east", "generators": 1}]
    plan = by_name(plan_job(job(sites, generators=3), ENDPOINTS, PATHS, {"west": WEST, "east": EAST}))
    for prefix, count, folder in (("", 3, "/runs/j-1"), ("west-", 3, "/runs/j-1/sites/west"), ("east-", 1, "")):
        names = [f"{prefix}generator-{index}" for index in range(count)]
        assert [name for name in plan if name.startswith(f"{prefix}generator-")] == names
        told = plan[f"{prefix}actor-0"].env["LONGSHORE_GENERATOR"].split(",")
        assert told[:-1] == [plan[name].env["LONGSHORE_LISTEN"] for name in names]
        assert told[-1] == f"file://{folder or '/runs/j-1/sites/east'}/generators.txt"
        assert parse_entries(told[-1]) == (told[-1],)


def test_threads_are_for_learner_and_generator() -> None:
    plan = by_name(plan_job(job(threads=4), ENDPOINTS, PATHS))
    widths = {name: spec.env["OMP_NUM_THREADS"] for name, spec in plan.items()}
    assert widths == {"learner": "4", "generator-0": "4", "verifier-0": "1", "actor-0": "1", "actor-1": "1"}


def test_the_plan_is_the_same_every_time() -> None:
    assert plan_job(job(), ENDPOINTS, PATHS) == plan_job(job(), ENDPOINTS, PATHS)


WEST = BrokerCommand(("valkey-server", "--dir", "/w"), "unix:///s/west.sock")
EAST = BrokerCommand(("valkey-server", "--dir", "/e"), "unix:///s/east.sock")


def test_a_rollout_site_has_everything_of_its_own_and_only_its_relay_knows_home() -> None:
    sites: list[dict[str, object]] = [{"name": "west", "actors": 2, "rollouts_per_actor": 8}, {"name": "east"}]
    plan = by_name(plan_job(job(sites, actors=1), ENDPOINTS, PATHS, {"west": WEST, "east": EAST}))
    assert list(plan) == [
        *("learner", "generator-0", "verifier-0", "actor-0"),
        *("west-broker", "west-relay", "west-generator-0", "west-verifier-0", "west-actor-0", "west-actor-1"),
        *("east-broker", "east-relay", "east-generator-0", "east-verifier-0", "east-actor-0"),
    ]
    assert plan["west-broker"].argv == WEST.argv
    assert plan["west-broker"].ready == Ready(ReadyKind.REDIS, WEST.url)
    for name, spec in plan.items():
        if not name.startswith("west-") or name == "west-broker":
            continue
        assert spec.env["LONGSHORE_SITE"] == "west"
        assert spec.argv[-1] == spec.service
        for home in (ENDPOINTS.broker_url, ENDPOINTS.weights):
            assert (home in spec.env.values()) == (name == "west-relay")
    actor = plan["west-actor-1"].env
    assert actor["LONGSHORE_BROKER_URL"] == WEST.url
    assert actor["LONGSHORE_GENERATOR"].split(",")[0] == plan["west-generator-0"].env["LONGSHORE_LISTEN"]
    assert actor["LONGSHORE_VERIFIER"] == plan["west-verifier-0"].env["LONGSHORE_LISTEN"]
    relay = plan["west-relay"].env
    # The site's generators get their weights from the relay.
    assert plan["west-generator-0"].env["LONGSHORE_WEIGHTS"] == relay["LONGSHORE_LISTEN"]
    assert relay["LONGSHORE_HOME_WEIGHTS"] == ENDPOINTS.weights
    assert relay["LONGSHORE_BROKER_URL"] == WEST.url
    assert relay["LONGSHORE_HOME_BROKER_URL"] == ENDPOINTS.broker_url
    # Twice what it works on; what is said is taken.
    assert relay["LONGSHORE_ALLOWANCE"] == "32"
    assert plan["east-relay"].env["LONGSHORE_ALLOWANCE"] == "128"
    said = plan_job(job([{"name": "west", "allowance": 7}]), ENDPOINTS, PATHS, {"west": WEST})
    assert by_name(said)["west-relay"].env["LONGSHORE_ALLOWANCE"] == "7"


def test_no_two_processes_share_a_spool_and_large_rollouts_go_to_their_site() -> None:
    plan = by_name(plan_job(job([{"name": "west", "actors": 2}]), ENDPOINTS, PATHS, {"west": WEST}))
    spools = [spec.env["LONGSHORE_SPOOL_DIR"] for spec in plan.values() if "LONGSHORE_SPOOL_DIR" in spec.env]
    assert len(spools) == len(set(spools)) == 5
    assert all(path.startswith("/runs/j-1/") for path in spools)
    home, west = "file:///runs/j-1/blobs", "file:///runs/j-1/sites/west/blobs"
    blobs = {name: spec.env.get("LONGSHORE_BLOBS_URL") for name, spec in plan.items()}
    assert blobs["learner"] == blobs["actor-0"] == plan["west-relay"].env["LONGSHORE_HOME_BLOBS_URL"] == home
    assert blobs["west-actor-0"] == blobs["west-relay"] == west


def test_without_home_actors_the_home_site_makes_no_rollouts() -> None:
    plan = by_name(plan_job(job([{"name": "west"}], actors=0), ENDPOINTS, PATHS, {"west": WEST}))
    assert [name for name in plan if not name.startswith("west-")] == ["learner"]


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


def test_another_python_is_the_generators_alone() -> None:
    plan = plan_job(job([{"name": "west"}]), ENDPOINTS, PATHS, {"west": WEST}, "/vllm/bin/python")
    pythons = {spec.name: spec.argv[0] for spec in plan if spec.service != "broker"}
    assert pythons.pop("generator-0") == pythons.pop("west-generator-0") == "/vllm/bin/python"
    assert set(pythons.values()) == {sys.executable}
    assert by_name(plan)["generator-0"].argv[1:] == ("-m", "longshore", "serve", "generator")
