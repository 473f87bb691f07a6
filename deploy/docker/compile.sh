# Compiles to bytecode what a service imports when it starts, so that it starts fast, and not what it never does:
# `compile.sh PREFIX SERVICE`.
set -eu
HOME=/tmp "$1/bin/python" - "$2" <<'PYTHON'
import contextlib
import importlib
import sys

for name in (
    f"longshore.{sys.argv[1]}.service",
    "longshore.console.app",
    "longshore.launcher.waiting",
    "alembic.command",
    "aiosqlite",
    "asyncpg",
    "reasoning_gym",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "uvicorn.protocols.http.h11_impl",
):
    # None has all of them.
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(name)
PYTHON
