"""The kernels: numpy's, and C's for every instruction set that this machine runs, built here from the source."""

import ctypes
from pathlib import Path

import pytest

import hatch_build
from longshore.weight_store.codec import native
from longshore.weight_store.codec.kernel_numpy import NumpyKernel

ROOT = Path(hatch_build.__file__).parent


@pytest.fixture(scope="session")
def native_kernels(tmp_path_factory):
    """By instruction set."""
    folder = tmp_path_factory.mktemp("kernel")
    made = {}
    for level, name in native.LIBRARIES.items():
        flags = [*hatch_build.FLAGS, *hatch_build.LIBRARIES[name]]
        if hatch_build.compile_kernel(ROOT / hatch_build.CODEC, folder / name, flags):
            made[level] = folder / name
    if not made:
        pytest.skip("no C compiler")
    runs = ctypes.CDLL(str(made[0])).ls_level()
    return {level: native.NativeKernel(path) for level, path in made.items() if level <= runs}


@pytest.fixture(params=["numpy", *native.LIBRARIES])
def kernel(request):
    """Numpy's, and C's by level; where this machine does not run a level, the next lower one."""
    if request.param == "numpy":
        return NumpyKernel()
    kernels = request.getfixturevalue("native_kernels")
    return kernels[min(request.param, max(kernels))]
