"""The wheel: with the kernel where there is a compiler, and without it where there is none."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hatch_build
from longshore.weight_store.codec import kernels, native
from longshore.weight_store.codec.kernel_numpy import NumpyKernel

ROOT = Path(hatch_build.__file__).parent


@pytest.fixture
def tree(tmp_path):
    """The project, as much of it as a wheel of the codec needs."""
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / hatch_build.CODEC, tmp_path / hatch_build.CODEC, ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


def wheel(tree, compiler):
    """Builds it; returns its name and the libraries in it."""
    argv = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", "dist"]
    environment = {**os.environ, "CC": compiler}
    subprocess.run(argv, cwd=tree, env=environment, check=True, capture_output=True, timeout=200)
    (made,) = (tree / "dist").iterdir()
    with zipfile.ZipFile(made) as archive:
        return made.name, {Path(name).name for name in archive.namelist() if name.endswith(".so")}


def test_a_wheel_has_the_kernel(tree):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    name, libraries = wheel(tree, "cc")
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert native.LIBRARIES[0] in libraries


def test_without_a_compiler_the_wheel_is_built_all_the_same(tree):
    name, libraries = wheel(tree, "no-such-compiler")
    assert name.endswith("-py3-none-any.whl")
    assert not libraries


def test_without_the_kernel_numpy_does_its_work(monkeypatch, tmp_path):
    def nowhere():
        return native.NativeKernel(tmp_path / "none.so")

    monkeypatch.setattr(native, "load", nowhere)
    kernels.best.cache_clear()
    try:
        assert isinstance(kernels.best(), NumpyKernel)
    finally:
        kernels.best.cache_clear()
