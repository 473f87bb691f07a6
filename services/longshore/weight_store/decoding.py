"""From the encodings of a path to a version's tensors, proven against its signed manifest.

The codecs need numpy, which not every reader of manifests has: they are imported when the first payload is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from longshore.errors import Rejected
from longshore.proto.v1 import weights_pb2
from longshore.weight_store import payload
from longshore.weight_store.payload import Tensor, TensorInfo, max_payload_bytes

PLANES = "longshore-planes/1"
DELTA = "longshore-delta/1"
# What this version of Longshore decodes, and so asks a store for.
CODECS = (payload.CODEC, PLANES, DELTA)


@dataclass(frozen=True)
class Proven:
    """A version's tensors, each equal to what the signed manifest says of it. Both lists are in the manifest's order."""

    infos: tuple[TensorInfo, ...]
    tensors: tuple[Tensor, ...]


def check_path(path: Sequence[weights_pb2.PathStep], version: int, infos: Sequence[TensorInfo]) -> None:
    """Refuses a path before any of its bytes is taken. Raises Rejected: it cannot lead to the version."""
    if not path or path[-1].version != version:
        raise Rejected("path", f"the path does not end at version {version}")
    bound = max_payload_bytes(infos)
    for before, step in zip((None, *path), path, strict=False):
        encoding = step.encoding
        if encoding.codec not in CODECS:
            raise Rejected("codec", f"codec {encoding.codec!r} is none of {', '.join(CODECS)}")
        if len(encoding.sha256) != 32 or encoding.size > bound:
            raise Rejected(
                "encoding", f"an encoding of version {step.version} has a size or SHA-256 that cannot be right"
            )
        if (encoding.codec == DELTA) != encoding.HasField("base_version"):
            raise Rejected(
                "encoding", f"an encoding of version {step.version} has no base, or one that it does not need"
            )
        if before is not None and encoding.base_version != before.version:
            raise Rejected("path", f"the path breaks between versions {before.version} and {step.version}")


def decode_path(
    path: Sequence[weights_pb2.PathStep],
    payloads: Sequence[bytes | bytearray],
    base: Proven | None,
    infos: Sequence[TensorInfo],
    threads: int = 1,
) -> Proven:
    """Decodes a checked path. Only the last result is compared with the manifest, because that decides.

    Args:
        base: what the first encoding is decoded against; None for a full one.
        infos: what the version's manifest says.

    Raises:
        IntegrityError: naming the first thing that does not match.
    """
    tensors: Sequence[Tensor] = base.tensors if base else ()
    # Digest of each tensor where it is known: what lies between two versions is not hashed.
    known = {id(tensor): info for tensor, info in zip(base.tensors, base.infos, strict=True)} if base else {}
    for number, (step, data) in enumerate(zip(path, payloads, strict=True), start=1):
        last = number == len(path)
        view = memoryview(data)
        if step.encoding.codec == payload.CODEC:
            tensors = payload.decode(view, infos, verify=last)
        elif step.encoding.codec == PLANES:
            tensors = _planes().decode(view, infos, threads, verify=last)
        else:
            unhashed = [
                known.get(id(tensor)) or replace(info, blake3=b"") for tensor, info in zip(tensors, infos, strict=True)
            ]
            tensors = _delta().decode(view, tensors, infos, threads, verify=last, base_infos=unhashed)
    return Proven(tuple(infos), tuple(tensors))


def _planes() -> ModuleType:
    from longshore.weight_store.codec import planes

    return planes


def _delta() -> ModuleType:
    from longshore.weight_store.codec import delta

    return delta
