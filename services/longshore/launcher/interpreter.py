"""Which Python runs a job's generators: vLLM needs versions of torch and transformers of its own, so an environment."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from longshore.config import JobSpec
from longshore.errors import ConfigError

VLLM_PYTHON = "LONGSHORE_VLLM_PYTHON"
# Beside the environment that runs this; `make vllm` builds it.
VLLM_ENVIRONMENT = ".venv-vllm"


def generator_python(spec: JobSpec) -> str:
    """The interpreter of a job's generators.

    Raises:
        ConfigError: the job wants vLLM, and none is installed where it is looked for.
    """
    if spec.generator.engine != "vllm":
        return sys.executable
    named = os.environ.get(VLLM_PYTHON)
    if named:
        if not os.access(named, os.X_OK):
            raise ConfigError(f"{VLLM_PYTHON} {named!r} is no Python interpreter")
        return named
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    beside = Path(sys.prefix).parent / VLLM_ENVIRONMENT / "bin" / "python"
    if not os.access(beside, os.X_OK):
        raise ConfigError(
            f"generator.engine is vllm, which is not installed here, nor in {beside.parents[1]}: run `make vllm`, or "
            f"set {VLLM_PYTHON} to the Python of an environment that has it"
        )
    return str(beside)
