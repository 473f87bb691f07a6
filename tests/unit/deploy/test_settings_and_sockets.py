from __future__ import annotations

import asyncio
import importlib.util
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from longshore.errors import ConfigError
from longshore.launcher.plan import Endpoints, JobPaths, plan_job
from longshore.launcher.spec import ProcessSpec, Ready, ReadyKind
from longshore.launcher.worker import foreign
from longshore.launcher.worker_sockets import WORKER_SERVICES, WorkerName, find_workers, on_sockets
from longshore.rpc.server import RpcServer
from longshore.settings import JobFile
from longshore.telemetry import health
from longshore.telemetry.health import HEALTH
from longshore.telemetry.metrics import MetricsServer
from longshore.weights.config import WeightsSettings

ROOT = Path(__file__).parents[3]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_secret_comes_from_its_file_unless_the_variable_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "longshore_store_url").write_text("s3://bucket\n")
    monkeypatch.setenv("LONGSHORE_SECRETS_DIR", str(tmp_path))
    assert WeightsSettings.from_environment().store_url == "s3://bucket"
    monkeypatch.setenv("LONGSHORE_STORE_URL", "/var/weights")
    assert WeightsSettings.from_environment().store_url == "/var/weights"
    monkeypatch.setenv("LONGSHORE_SECRETS_DIR", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"LONGSHORE_SECRETS_DIR .*none"):
        WeightsSettings.from_environment()


async def test_a_health_check_hears_whether_the_process_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = script("deploy/docker/healthcheck.py")
    metrics = MetricsServer("127.0.0.1:0", "test")
    metrics.start()
    rpc = RpcServer("127.0.0.1:0")
    monkeypatch.setenv("LONGSHORE_METRICS_LISTEN", metrics.address)
    try:
        HEALTH.ended()
        assert await asyncio.to_thread(check.main) == 1
        assert "503" in capsys.readouterr().err
        await rpc.start()
        assert await asyncio.to_thread(check.main) == 0
        # A loop that is stuck answers nobody.
        monkeypatch.setattr(health, "_ANSWER_S", 0.05)
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(check.main).result(20) == 1
        await rpc.drain(0.0)
        assert await asyncio.to_thread(check.main) == 1
    finally:
        metrics.stop()
    capsys.readouterr()
    assert await asyncio.to_thread(check.main) == 1
    assert "refused" in capsys.readouterr().err


def test_sockets_take_the_place_of_the_ports_that_a_plan_leaves_open(tmp_path: Path) -> None:
    env = {
        "LONGSHORE_LISTEN": "127.0.0.1:${PORT:actor-0.grpc}",
        "LONGSHORE_GENERATOR": "127.0.0.1:${PORT:generator-0.grpc}",
        "LONGSHORE_METRICS_LISTEN": "127.0.0.1:${PORT:actor-0.metrics}",
    }
    spec = ProcessSpec("actor-0", "actor", ("x",), env, tmp_path, Ready(ReadyKind.GRPC, env["LONGSHORE_LISTEN"]))
    placed = on_sockets(spec, "job-1", Path("/run/longshore"))
    assert re.fullmatch(r"unix:/run/longshore/[0-9a-f]{8}-actor-0\.sock", placed.env["LONGSHORE_LISTEN"])
    assert placed.ready.address == placed.env["LONGSHORE_LISTEN"]
    assert placed.env["LONGSHORE_GENERATOR"].endswith("-generator-0.sock")
    assert placed.env["LONGSHORE_METRICS_LISTEN"] == env["LONGSHORE_METRICS_LISTEN"]
    assert on_sockets(spec, "job-2", Path("/run/longshore")).env != placed.env


def test_workers_are_found_by_the_names_of_their_sockets(tmp_path: Path) -> None:
    name = WorkerName("actor", 4, "3f2a")
    for path in (name.socket(tmp_path), tmp_path / "ab12-actor-0.sock", tmp_path / "gateway.1.x.worker"):
        path.touch()
    assert find_workers(tmp_path) == {name.socket(tmp_path): name}


def test_secrets_are_made_once_and_fit_each_other(tmp_path: Path) -> None:
    make = script("deploy/compose/make_secrets.py").make
    folder = tmp_path / "secrets"
    made = make(folder)
    text = {name: (folder / name).read_text().strip() for name in made}
    assert f"requirepass {text['longshore_broker_url'].split(':')[2].split('@')[0]}" in text["broker.conf"]
    assert f":{text['postgres_password']}@" in text["longshore_database_url"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert make(folder) == []
    assert {name: (folder / name).read_text().strip() for name in made} == text


def test_an_image_installs_what_its_extra_says() -> None:
    requirements = script("deploy/docker/requirements.py").requirements
    actor = requirements(ROOT / "pyproject.toml", ["actor"])
    assert any(line.startswith("tokenizers") for line in actor)
    assert not any(line.startswith(("torch", "longshore")) for line in actor)
    assert any(line.startswith("torch") for line in requirements(ROOT / "pyproject.toml", ["local"]))


def test_a_worker_takes_every_setting_that_a_plan_gives(tmp_path: Path) -> None:
    document = {
        "name": "j",
        "tasks": {"source": "jsonl", "path": "x.jsonl"},
        "verifier": {"name": "exact-match"},
        "train": {"steps": 3},
        "resources": {"generators": 2},
    }
    file = JobFile.model_validate({"project": "p", "job": "j-1", "spec": document, "learner_public_key": "ab" * 32})
    plan = plan_job(file, Endpoints("redis://b", "unix:/w"), JobPaths(tmp_path, tmp_path / "key"))
    assert {spec.service for spec in plan} == WORKER_SERVICES
    for spec in plan:
        placed = on_sockets(spec, "j-1", tmp_path)
        assert foreign(placed) == [], spec.name
        grpc = [value for name, value in placed.env.items() if name.endswith(("_LISTEN", "_GENERATOR", "_VERIFIER"))]
        assert not any(".grpc}" in value for value in grpc), spec.name
