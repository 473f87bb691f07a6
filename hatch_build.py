"""Builds the package's C kernels, the weight codec's and the torch engine's attention: a build hook of hatchling, and
a script for a checkout.

Plain C files, loaded by ctypes: they know no Python, so one wheel serves every version of it. Without a compiler the
package installs all the same; its codec then runs on numpy and its attention on torch, much slower.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CODEC = Path("services/longshore/weight_store/codec")
_AVX2 = ["-mavx2", "-mbmi", "-mbmi2", "-mpopcnt"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ATTENTION = Path("services/longshore/generator/attention")
# Folders with a kernel.c and a native.py that loads what is built of it, and their own flags: for all, and for AVX2.
KERNELS: dict[Path, tuple[list[str], list[str]]] = {CODEC: ([], []), ATTENTION: (["-ffp-contract=fast"], ["-mfma"])}
# By file, as longshore.c_library knows them: for any processor, and for most and for newer ones of x86-64.
LIBRARIES: dict[str, list[str]] = {"_kernel.so": [], "_kernel_avx2.so": _AVX2, "_kernel_avx512.so": _AVX512}
# Nothing is fused unasked: an adapter's product has the same bits everywhere (codec/product.h).
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=off")


def build(root: Path) -> list[str]:
    """Compiles the kernels in the source tree, and removes what was built of older source.

    Returns the files that were made: none without a compiler.
    """
    made = []
    for kernel, (flags, avx2) in KERNELS.items():
        folder = root / kernel
        for name, own in LIBRARIES.items():
            (folder / name).unlink(missing_ok=True)
            if own and platform.machine() not in ("x86_64", "AMD64"):
                continue
            if compile_kernel(folder, folder / name, [*FLAGS, *flags, *own, *(avx2 if own else [])]):
                made.append(str(kernel / name))
    return made


def compile_kernel(source: Path, library: Path, flags: list[str]) -> bool:
    """Returns False where there is no compiler, or none that knows the flags."""
    compiler = os.environ.get("CC") or "cc"
    # Made beside and then moved: a process that has the old one loaded keeps it.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        which = f"-DLONGSHORE_SOURCE=0x{_digest(source)}u"
        command = [compiler, *flags, which, str(source / "kernel.c"), "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            sys.stderr.write(f"{shlex.join(command)}: {getattr(error, 'stderr', None) or error}\n")
            return False
        made.replace(library)
    return True


def _digest(source: Path) -> str:
    """By which longshore.c_library knows a library of its own source from another."""
    files = sorted(source.glob("*.[ch]"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


class KernelHook(BuildHookInterface):  # type: ignore[type-arg]
    """Makes the wheel one of this platform, for any Python 3."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        made = build(Path(self.root))
        if not made:
            self.app.display_warning("longshore: the C kernels were not built; numpy and torch do their work, slowly")
            return
        build_data["artifacts"] += made
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


if __name__ == "__main__":
    sys.exit(not build(Path(__file__).parent))
