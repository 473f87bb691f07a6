"""Whatever a payload's bytes are: the right tensors or an IntegrityError, within bounds of memory and of time."""

import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from codec_fuzz import attack, damaged, joined, outcome, parts, sample

import hatch_build
from longshore.errors import IntegrityError
from longshore.weight_store.codec import choice, delta, frame, native, planes
from longshore.weight_store.payload import Tensor, layout_digest, tensor_info

ROOT = Path(hatch_build.__file__).parent


def test_damaged_payloads_are_refused(kernel):
    count = 60
    # A few bits of a payload can be flipped to no effect: padding, or bins that no longer matter.
    assert attack(kernel, seed=1, count=count) >= count * 0.9


@pytest.mark.parametrize("level", native.LIBRARIES)
def test_a_sanitizer_finds_nothing(level, native_kernels, tmp_path):
    level = min(level, max(native_kernels))
    library = tmp_path / "sanitized.so"
    flags = ["-g", "-O1", "-std=gnu11", "-fPIC", "-shared", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += hatch_build.LIBRARIES[native.LIBRARIES[level]]
    if not hatch_build.compile_kernel(ROOT / hatch_build.CODEC, library, flags):
        pytest.skip("the compiler has no sanitizers")
    found = subprocess.run(["cc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("services", "tests/support")),
    }
    script = ROOT / "tests/support/codec_fuzz.py"
    argv = [sys.executable, str(script), str(library), str(level), "150"]
    ended = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-4000:]


def test_a_header_cannot_ask_for_memory(kernel):
    """Sizes that a payload claims are checked before anything of that size is made."""
    rng = np.random.default_rng(3)
    base, new = sample(rng)
    infos = [tensor_info(tensor) for tensor in new]
    payload = delta.encode(base, new, kernel=kernel)
    allowed = 4 * sum(info.num_bytes for info in infos) + 2**22
    tracemalloc.start()
    try:
        for _ in range(200):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            outcome(lambda: delta.decode(damaged(rng, payload), base, infos, kernel=kernel), new)
            assert tracemalloc.get_traced_memory()[1] - before < allowed
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("decode", [lambda p, t, i: delta.decode(p, t, i), lambda p, t, i: planes.decode(p, i)])
def test_a_bomb_is_refused_by_its_claim(decode):
    tensor = Tensor("w", "bfloat16", (4,), bytes(8))
    made = delta.encode([tensor], [tensor]) if decode.__code__.co_names[0] == "delta" else planes.encode([tensor])
    start, _, _ = parts(made)
    with pytest.raises(IntegrityError, match="at most"):
        decode(joined(start, bytes(10**8), b""), [tensor], [tensor_info(tensor)])


def test_what_is_left_over_is_named():
    rng = np.random.default_rng(5)
    base, new = sample(rng)
    infos = [tensor_info(tensor) for tensor in new]
    payload = delta.encode(base, new)
    with pytest.raises(IntegrityError, match="goes on"):
        delta.decode(payload + b"x", base, infos)
    with pytest.raises(IntegrityError, match="ends within"):
        delta.decode(payload[:-1], base, infos)
    with pytest.raises(IntegrityError, match="not of format"):
        delta.decode(planes.encode(new), base, infos)
    with pytest.raises(IntegrityError, match="tensor t1 does not match"):
        delta.decode(payload, base, [*infos[:1], tensor_info(base[1]), *infos[2:]])


@pytest.mark.parametrize(("shape", "rows"), [((64, 64), bytes(8)), ((0, 64), b""), ((0,), None)])
def test_a_tensor_that_is_said_to_have_changed_and_of_which_nothing_is_coded_is_refused(
    shape: tuple[int, ...], rows: bytes | None
) -> None:
    """It would be memory that nobody has filled, and that nothing verifies."""
    size = 2 * math.prod(shape)
    old, new = (Tensor("w", "bfloat16", shape, bytes([fill]) * size) for fill in (1, 2))
    fields = [np.array([choice.SPARSE if rows is None else choice.SPARSE_ROWS], np.uint8)]
    fields += [np.frombuffer(rows, np.uint8)] if rows else []
    payload = frame.pack(delta._MAGIC, layout_digest([old]), fields, [])
    with pytest.raises(IntegrityError, match="has nothing of it"):
        delta.decode(payload, [old], [tensor_info(new)])
