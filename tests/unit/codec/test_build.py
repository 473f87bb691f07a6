"""The wheel: with the kernels where there is a compiler, and without it where there is none."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import hatch_build
from longshore.weight_store.codec import delta, kernel_numpy, kernels, native
from longshore.weight_store.codec.kernel_numpy import NumpyKernel
from longshore.weight_store.payload import Tensor, tensor_info

ROOT = Path(hatch_build.__file__).parent


@pytest.fixture
def tree(tmp_path):
    """The project, as much of it as a wheel of the kernels needs."""
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in hatch_build.KERNELS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


def wheel(tree, compiler):
    """Builds it; returns its name and the libraries in it."""
    argv = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", "dist"]
    environment = {**os.environ, "CC": compiler}
    subprocess.run(argv, cwd=tree, env=environment, check=True, capture_output=True, timeout=200)
    (made,) = (tree / "dist").iterdir()
    with zipfile.ZipFile(made) as archive:
        return made.name, {name for name in archive.namelist() if name.endswith(".so")}


def test_a_wheel_has_the_kernels(tree):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    name, libraries = wheel(tree, "cc")
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    packages = [folder.relative_to("services") for folder in hatch_build.KERNELS]
    assert {str(package / native.LIBRARIES[0]) for package in packages} <= libraries


def test_without_a_compiler_the_wheel_is_built_all_the_same(tree):
    name, libraries = wheel(tree, "no-such-compiler")
    assert name.endswith("-py3-none-any.whl")
    assert not libraries


@pytest.fixture
def no_kernel(monkeypatch, tmp_path):
    def nowhere():
        return native.NativeKernel(tmp_path / "none.so")

    monkeypatch.setattr(native, "load", nowhere)
    kernels.best.cache_clear()
    yield
    kernels.best.cache_clear()


def test_without_the_kernel_numpy_does_its_work_and_does_not_take_on_too_much(no_kernel, monkeypatch):
    assert isinstance(kernels.best(), NumpyKernel)
    base = np.arange(60_000, dtype=np.uint16)
    new = base.copy()
    new[::20] ^= 1
    before, after = ([Tensor("w", "bfloat16", (60_000,), own.tobytes())] for own in (base, new))
    # Three thousand changes, each in Python, would be a tenth of a second; in a real model, minutes.
    monkeypatch.setattr(kernel_numpy, "_scan_piece", None)
    payload = delta.encode(before, after)
    assert bytes(delta.decode(payload, before, [tensor_info(after[0])])[0].data) == new.tobytes()


def test_a_library_of_other_source_is_as_good_as_none(tmp_path):
    """The same functions may take other arguments."""
    folder = tmp_path / "older"
    shutil.copytree(ROOT / hatch_build.CODEC, folder, ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
    with (folder / "tiles.h").open("a") as file:
        file.write("/* older */\n")
    library = folder / "kernel.so"
    if not hatch_build.compile_kernel(folder, library, [*hatch_build.FLAGS]):
        pytest.skip("no C compiler")
    with pytest.raises(OSError, match="other source"):
        native.NativeKernel(library)
    (folder / "none.c").write_text("int nothing(void) { return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "none.c", "-o", "none.so"], cwd=folder, check=True)
    with pytest.raises(OSError, match="other source"):
        native.NativeKernel(folder / "none.so")
