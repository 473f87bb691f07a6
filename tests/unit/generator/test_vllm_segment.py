"""Weights in shared memory, and which of them a version needs sent: without vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longshore.errors import IntegrityError
from longshore.generator.vllm_engine.loading import block_of, check_like, to_send
from longshore.generator.vllm_engine.segment import Segment, read_segment

TENSORS = {
    "model.embed_tokens.weight": torch.randn(5, 3).to(torch.bfloat16),
    "model.layers.0.mlp.up_proj.weight": torch.randn(7, 3),
    "model.layers.0.mlp.gate_proj.weight": torch.randn(7, 3).t(),
    "model.layers.10.norm.weight": torch.randn(1).to(torch.float16),
    "model.norm.bias": torch.tensor(1.5),
    "model.empty": torch.empty(0, 4),
}


def test_tensors_come_back_bit_for_bit() -> None:
    with Segment(TENSORS) as segment:
        read = dict(read_segment(segment.path, segment.size))
    # Who has it mapped may read on after it was closed.
    assert list(read) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor)


def test_another_process_reads_it_and_cannot_write() -> None:
    program = (
        "import os, sys; from longshore.generator.vllm_engine.segment import read_segment\n"
        "path, size = sys.argv[1], int(sys.argv[2])\n"
        "print(sum(float(t.sum()) for _, t in read_segment(path, size)))\n"
        "try: os.pwrite(os.open(path, os.O_RDWR), b'x', size - 1)\n"
        "except OSError as error: print(error.errno)\n"
    )
    with Segment({"a": torch.arange(10.0)}) as segment:
        argv = [sys.executable, "-c", program, segment.path, str(segment.size)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "45.0"
    assert int(done.stdout.split()[1]) in (1, 13, 26)


def test_a_closed_segment_is_gone() -> None:
    segment = Segment({"a": torch.ones(3)})
    path = segment.path
    assert Path(path).exists()
    segment.close()
    segment.close()
    with pytest.raises(OSError):
        list(read_segment(path, segment.size))


def test_a_dtype_that_no_weights_have_is_refused() -> None:
    with pytest.raises(IntegrityError, match=r"tensor a: dtype torch\.int64"):
        Segment({"a": torch.ones(3, dtype=torch.int64)})


def forged(data: bytes, *, sealed: bool = True) -> tuple[int, str, int]:
    import fcntl

    fd = os.memfd_create("forged", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 15)
    return fd, f"/proc/{os.getpid()}/fd/{fd}", len(data)


def with_header(header: object, body: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: str = "float32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "data",
    [
        b"short",
        (1 << 60).to_bytes(8, "little") + b"{}" * 40,
        (0).to_bytes(8, "little") + b"{}" * 40,
        (10).to_bytes(8, "little") + b"not JSON at all",
        with_header([1, 2]),
        with_header({"a": 1}),
        with_header(entry(dtype="int8")),
        with_header(entry(shape=[-2])),
        with_header(entry(shape="x")),
        with_header(entry(offsets=[0, 4])),
        with_header(entry(offsets=[60, 68])),
        with_header(entry(offsets=[-8, 0])),
        with_header(entry(shape=[1 << 40], offsets=[0, 8])),
    ],
)
def test_what_is_forged_is_refused(data: bytes) -> None:
    fd, path, size = forged(data)
    try:
        with pytest.raises(IntegrityError):
            list(read_segment(path, size))
    finally:
        os.close(fd)


def test_what_might_still_change_or_has_another_size_is_refused() -> None:
    fd, path, size = forged(with_header(entry()), sealed=False)
    try:
        with pytest.raises(IntegrityError, match="not sealed"):
            list(read_segment(path, size))
        with pytest.raises(IntegrityError, match=f"has {size} bytes, not {size + 1}"):
            list(read_segment(path, size + 1))
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("model.layers.3.mlp.experts.7.w1", "model.layers.3"),
        ("lm_head.weight", "lm_head"),
        ("model.norm.weight", "model.norm"),
    ],
)
def test_blocks(name: str, block: str) -> None:
    assert block_of(name) == block


def test_only_the_blocks_with_a_change_are_sent_and_those_whole() -> None:
    changed = dict(TENSORS)
    changed["model.layers.0.mlp.up_proj.weight"] = torch.zeros(7, 3)
    sent = to_send(changed, TENSORS)
    assert list(sent) == ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"]
    assert to_send(TENSORS, dict(TENSORS)) == {}
    assert to_send(TENSORS, None) == TENSORS


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.bias"]


def _with_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.more"] = torch.ones(1)


def _reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.bias"] = torch.ones(2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_without, r"missing: model\.norm\.bias"),
        (_with_more, r"unknown: model\.more"),
        (_reshaped, r"\(2,\), not \(\)"),
    ],
)
def test_another_models_tensors_are_refused(change: Callable[[dict[str, torch.Tensor]], None], what: str) -> None:
    changed = dict(TENSORS)
    change(changed)
    check_like(changed, None)
    with pytest.raises(IntegrityError, match=what):
        check_like(changed, TENSORS)
