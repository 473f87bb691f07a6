"""Prometheus's own checks of its configuration and of the alarms: `make test-deploy`, with promtool on the path."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"

if shutil.which("promtool") is None:
    reason = "promtool is not on the path"
    if os.environ.get("LONGSHORE_REQUIRE_ALL"):
        raise RuntimeError(reason)
    pytest.skip(reason, allow_module_level=True)


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alarms_are_valid() -> None:
    promtool("check", "rules", "rules.yml")


def test_the_configuration_is_valid(tmp_path: Path) -> None:
    # It names the rules where the container has them.
    text = (FOLDER / "prometheus.yml").read_text().replace("/etc/prometheus/", f"{FOLDER}/")
    path = tmp_path / "prometheus.yml"
    path.write_text(text)
    promtool("check", "config", str(path))


def test_the_alarms_go_off_when_they_should() -> None:
    promtool("test", "rules", "rules.test.yml")
