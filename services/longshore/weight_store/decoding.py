"""From an encoding's bytes to proven tensors, whichever its codec.

The codecs need NumPy, which is imported when the first of their payloads is decoded: who only reads manifests does
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longshore.errors import IntegrityError, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.weight_store import payload
from longshore.weight_store.copies import HostCopy
from longshore.weight_store.payload import Tensor, TensorInfo
from longshore.weight_store.planner import Step

SAFETENSORS = payload.CODEC
PLANES = "longshore-planes/1"
DELTA = "longshore-delta/1"
ADAPTER = "longshore-adapter/1"
# Everything that this version of Longshore can decode.
CODECS = (SAFETENSORS, PLANES, DELTA, ADAPTER)

DELTA_KINDS = (weights_pb2.ENCODING_KIND_DELTA, weights_pb2.ENCODING_KIND_MERGED_DELTA)
# The codecs of each kind; all but the full ones are decoded against a base.
_ALLOWED: dict[int, tuple[str, ...]] = {
    weights_pb2.ENCODING_KIND_FULL: (SAFETENSORS, PLANES),
    weights_pb2.ENCODING_KIND_DELTA: (DELTA,),
    weights_pb2.ENCODING_KIND_MERGED_DELTA: (DELTA,),
    weights_pb2.ENCODING_KIND_ADAPTER: (ADAPTER,),
}


def check_encoding(encoding: weights_pb2.Encoding, version: int, infos: Sequence[TensorInfo]) -> None:
    """Whether an encoding can be one of the version with these tensors. Raises Rejected, saying why not."""
    allowed = _ALLOWED.get(encoding.kind)
    if allowed is None:
        raise Rejected("encoding", f"unknown kind of encoding {encoding.kind}")
    if encoding.codec not in allowed:
        raise Rejected("encoding", f"codec {encoding.codec!r} is none of {', '.join(allowed)}")
    has_base = encoding.kind != weights_pb2.ENCODING_KIND_FULL
    if has_base != encoding.HasField("base_version"):
        raise Rejected("encoding", "a delta or adapter names its base version, and nothing else does")
    if has_base and encoding.base_version >= version:
        raise Rejected("encoding", f"version {version} cannot come from version {encoding.base_version}")
    if len(encoding.sha256) != 32 or encoding.size > max_encoding_bytes(infos):
        raise Rejected("encoding", f"the encoding's SHA-256 or its size of {encoding.size} cannot be right")


def is_adapter(encoding: weights_pb2.Encoding) -> bool:
    """Whether it is decoded against one base for the whole of a job, and not against the version before."""
    return encoding.kind == weights_pb2.ENCODING_KIND_ADAPTER


def max_encoding_bytes(infos: Sequence[TensorInfo]) -> int:
    """The most bytes that any encoding of these tensors can have: a safetensors file's, and 1/16 besides."""
    whole = payload.max_payload_bytes(infos)
    return whole + whole // 16


def decode(
    encoding: weights_pb2.Encoding,
    data: bytes | bytearray | memoryview,
    base: Sequence[Tensor],
    infos: Sequence[TensorInfo],
    *,
    threads: int = 1,
    verify: bool = True,
    base_infos: Sequence[TensorInfo] | None = None,
) -> tuple[Tensor, ...]:
    """The tensors of one encoding; with `verify` each is checked against its info.

    Args:
        base: for a delta or adapter, the tensors of its base version, in the same layout; else not looked at.
        base_infos: what `base` was proven against, which spares hashing what did not change.

    Raises:
        IntegrityError: naming the first thing that is wrong.
    """
    if encoding.codec == SAFETENSORS:
        return payload.decode(data, infos, verify)
    # Late, because they need NumPy.
    from longshore.weight_store.codec import adapter, delta, planes

    view = memoryview(data)
    if encoding.codec == PLANES:
        return tuple(planes.decode(view, infos, threads, verify))
    if encoding.codec not in (DELTA, ADAPTER):
        raise IntegrityError(f"unknown codec {encoding.codec!r}")
    codec = delta if encoding.codec == DELTA else adapter
    try:
        return tuple(codec.decode(view, base, infos, threads, verify, base_infos))
    except ValueError as error:
        raise IntegrityError(f"the encoding's base does not fit: {error}") from None


def walk(
    steps: Sequence[Step],
    read: Callable[[weights_pb2.Encoding], bytes | bytearray],
    start: HostCopy | None,
    infos: Sequence[TensorInfo],
    threads: int = 1,
) -> HostCopy:
    """Decodes a path to its end and proves the result; what lies between is not checked by itself.

    Args:
        read: the bytes of one encoding; whether they match their SHA-256 need not have been checked.
        start: the copy that a delta or adapter in the first step is decoded against.
        infos: of the last step's version.

    Raises:
        IntegrityError: the result is not what the manifest says. Any error of `read`.
    """
    tensors = start.tensors if start else ()
    for position, step in enumerate(steps, 1):
        tensors = decode(
            step.encoding,
            read(step.encoding),
            tensors,
            infos,
            threads=threads,
            verify=position == len(steps),
            base_infos=start.infos if start and len(steps) == 1 else None,
        )
    return HostCopy(tuple(infos), tensors, beside=bool(steps) and is_adapter(steps[-1].encoding))
