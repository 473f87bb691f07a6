from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import replace

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from longshore.errors import IntegrityError
from longshore.weight_store import payload
from longshore.weight_store.payload import Tensor, TensorInfo

TENSORS = [
    Tensor("b.weight", "float32", (2, 3), bytes(range(24))),
    Tensor("a.weight", "bfloat16", (5,), bytes(range(100, 110))),
    Tensor("scalar", "float16", (), b"\x00\x3c"),
    Tensor("nothing", "float32", (0, 4), b""),
]


def encoded(tensors: list[Tensor]) -> tuple[bytes, list[TensorInfo]]:
    infos = [payload.tensor_info(tensor) for tensor in tensors]
    return payload.encode_header(infos) + b"".join(tensor.data for tensor in tensors), infos


def check(data: bytes, infos: list[TensorInfo]) -> None:
    payload.check(io.BytesIO(data), hashlib.sha256(data).digest(), infos)


def rewritten(data: bytes, change) -> bytes:
    """The payload with another header."""
    length = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_tensors_come_back_in_order() -> None:
    data, infos = encoded(TENSORS)
    check(data, infos)
    assert payload.decode(data, infos) == tuple(TENSORS)


def test_the_library_reads_what_we_write() -> None:
    data, _ = encoded(TENSORS)
    found = dict(safetensors.deserialize(data))
    assert {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in found.items()} == {
        tensor.name: (payload.DTYPES[tensor.dtype][0], tensor.shape, tensor.data) for tensor in TENSORS
    }


def test_we_read_another_writers_header() -> None:
    """Metadata, other spacing, and names in another order than the bytes are the format's freedom."""
    data, infos = encoded(TENSORS)
    other = rewritten(data, lambda header: {"__metadata__": {"format": "pt"}, **dict(sorted(header.items()))})
    check(other, infos)
    assert payload.decode(other, infos) == tuple(TENSORS)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda header: {**header, "extra": header["nothing"]}, id="extra tensor"),
        pytest.param(lambda header: {key: header[key] for key in list(header)[1:]}, id="missing tensor"),
        pytest.param(lambda header: {**header, "scalar": {**header["scalar"], "dtype": "BF16"}}, id="dtype"),
        pytest.param(lambda header: {**header, "b.weight": {**header["b.weight"], "shape": [3, 2]}}, id="shape"),
        pytest.param(lambda header: {**header, "scalar": {**header["scalar"], "data_offsets": [0, 2]}}, id="overlap"),
        pytest.param(lambda header: {**header, "scalar": {**header["scalar"], "data_offsets": ["0", None]}}, id="type"),
        pytest.param(lambda header: {**header, "scalar": 5}, id="not an object"),
        pytest.param(lambda header: b"[" * 100_000, id="deep"),
        pytest.param(lambda header: b"\xff\xfe", id="not text"),
        pytest.param(lambda header: b"5", id="a number"),
    ],
)
def test_a_header_that_is_not_the_manifests_is_refused(change) -> None:
    data, infos = encoded(TENSORS)
    other = rewritten(data, change)
    with pytest.raises(IntegrityError):
        check(other, infos)
    with pytest.raises(IntegrityError):
        payload.decode(other, infos)


def test_a_name_twice_is_refused() -> None:
    data, infos = encoded(TENSORS[:1])
    entry = json.dumps({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]})
    with pytest.raises(IntegrityError):
        check(rewritten(data, lambda _: f'{{"b.weight": {entry}, "b.weight": {entry}}}'.encode()), infos)


@given(st.data())
def test_no_change_of_a_byte_passes(data: st.DataObject) -> None:
    good, infos = encoded(TENSORS)
    position = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[position] ^= data.draw(st.integers(1, 255))
    digest = hashlib.sha256(good).digest()
    with pytest.raises(IntegrityError):
        payload.check(io.BytesIO(bad), digest, infos)
    # Only the tensors are checked: a header may differ in its spaces.
    with contextlib.suppress(IntegrityError):
        assert payload.decode(bad, infos) == tuple(TENSORS)


def test_a_payload_under_another_address_is_refused() -> None:
    data, infos = encoded(TENSORS)
    with pytest.raises(IntegrityError, match="SHA-256"):
        payload.check(io.BytesIO(data), b"\0" * 32, infos)


@given(st.integers(0, 200))
def test_a_truncated_payload_is_refused(length: int) -> None:
    good, infos = encoded(TENSORS)
    short = good[: min(length, len(good) - 1)]
    with pytest.raises(IntegrityError):
        check(short, infos)
    with pytest.raises(IntegrityError):
        payload.decode(short, infos)


def test_a_header_may_not_claim_the_memory_of_the_machine() -> None:
    with pytest.raises(IntegrityError):
        check((2**62).to_bytes(8, "little") + b"{}", [])


def test_a_tensor_whose_bytes_do_not_fit_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="need 24"):
        payload.tensor_info(replace(TENSORS[0], data=b"\0" * 23))
    with pytest.raises(ValueError, match="int8"):
        payload.tensor_info(replace(TENSORS[0], dtype="int8"))


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 16))
def test_blocks_are_the_parts_in_equal_pieces(parts: list[bytes], size: int) -> None:
    found = list(payload.blocks(parts, size))
    assert b"".join(found) == b"".join(parts)
    assert all(len(block) == size for block in found[:-1])
    assert all(found)
