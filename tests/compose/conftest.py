"""docker-compose.yml on a real Docker engine that can pull nothing: our images are built, others have stand-ins."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = "longshore-test"
STANDINS = ("broker", "postgres", "prometheus")
SERVICES = ("gateway", "weights", "actor", "verifier", "generator", "learner")
# A start and a build are as fast as the machine is; these only end what hangs.
BUILD_S = 1800
UP_S = 600


class Compose:
    """One project with settings of its own."""

    def __init__(self, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.prometheus = f"http://127.0.0.1:{free_port()}"
        self.secrets = folder / "secrets"
        self._env = {
            **os.environ,
            "LONGSHORE_TAG": "test",
            "LONGSHORE_SECRETS": str(self.secrets),
            "LONGSHORE_HTTP": self.url.removeprefix("http://"),
            "LONGSHORE_PROMETHEUS": self.prometheus.removeprefix("http://"),
            **{f"LONGSHORE_{name.upper()}_IMAGE": f"longshore-standin-{name}" for name in STANDINS},
        }

    def __call__(self, *arguments: str, timeout: float = 120) -> str:
        """`docker compose ...` in this project; its output."""
        command = ["docker", "compose", "--project-name", PROJECT, "--env-file", "/dev/null", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self._env, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    def build(self) -> None:
        for name in STANDINS:
            folder = ROOT / "tests" / "compose" / "standins"
            docker("build", "--network=host", "--target", name, "--tag", f"longshore-standin-{name}", str(folder))
        for service in SERVICES:
            self("build", service, timeout=BUILD_S)

    def containers(self, service: str) -> list[str]:
        return self("ps", "--quiet", service).split()

    def api_key(self) -> str:
        return (self.secrets / "api_key").read_text().strip()


def docker(*arguments: str, timeout: float = BUILD_S) -> str:
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    done = subprocess.run(["docker", *arguments], env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def inspect(kind: str, name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(docker(kind, "inspect", name))
    return found[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_engine() -> None:
    reason = None
    if shutil.which("docker") is None:
        reason = "there is no Docker here"
    elif subprocess.run(["docker", "compose", "ls"], capture_output=True).returncode != 0:
        reason = "the Docker engine does not answer, or has no compose"
    if reason is None:
        return
    if os.environ.get("LONGSHORE_REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Compose:
    """Every image is built, unless LONGSHORE_TEST_IMAGES=built says that all have been."""
    require_engine()
    compose = Compose(tmp_path_factory.mktemp("compose"))
    subprocess.run(["python3", "deploy/compose/make_secrets.py", str(compose.secrets)], cwd=ROOT, check=True)
    if os.environ.get("LONGSHORE_TEST_IMAGES") != "built":
        compose.build()
    return compose


@pytest.fixture(scope="session")
def stack(images: Compose) -> Iterator[Compose]:
    """It is up, with Prometheus; nothing of it is left afterwards."""
    try:
        images("up", "--detach", "--wait", "--no-build", timeout=UP_S)
        # Of this profile there is a stand-in for Prometheus alone.
        images("--profile", "observability", "up", "--detach", "--no-deps", "--no-build", "prometheus")
        yield images
    finally:
        images("--profile", "*", "down", "--volumes", "--timeout", "20", timeout=UP_S)
