"""Which Python a job's generators get."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from longshore.config import JobSpec
from longshore.errors import ConfigError
from longshore.launcher.interpreter import VLLM_ENVIRONMENT, VLLM_PYTHON, generator_python


def spec(engine: str) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "j",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 3},
            "generator": {"engine": engine},
        }
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without vllm, in a folder of its own."""
    monkeypatch.delenv(VLLM_PYTHON, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return tmp_path


def python_in(folder: Path) -> Path:
    path = folder / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.touch(mode=0o755)
    return path


def test_the_torch_engine_runs_where_everything_runs(here: Path) -> None:
    python_in(here / VLLM_ENVIRONMENT)
    assert generator_python(spec("torch")) == sys.executable


def test_vllm_runs_in_the_environment_beside(here: Path) -> None:
    beside = python_in(here / VLLM_ENVIRONMENT)
    assert generator_python(spec("vllm")) == str(beside)


def test_vllm_runs_here_where_it_is_installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python_in(here / VLLM_ENVIRONMENT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert generator_python(spec("vllm")) == sys.executable


def test_a_named_python_comes_before_all(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = python_in(here / "elsewhere")
    monkeypatch.setenv(VLLM_PYTHON, str(named))
    assert generator_python(spec("vllm")) == str(named)
    monkeypatch.setenv(VLLM_PYTHON, str(here / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere"):
        generator_python(spec("vllm"))


def test_without_one_the_person_is_told_what_to_do(here: Path) -> None:
    with pytest.raises(ConfigError, match="make vllm"):
        generator_python(spec("vllm"))
