"""A version on its way to the store: hashed, signed, and cut into messages that can be sent any number of times."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from longshore.proto.v1 import weights_pb2
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weight_store import bundle, payload
from longshore.weight_store.payload import Tensor
from longshore.weight_store.product import Beside
from longshore.weight_store.version import HEAD, VersionDraft, build_manifest, sign_manifest, sign_pointer

# Renewed by every publish; long enough for the slowest step and for a finished job to be looked at.
HEAD_LIFETIME_S = 30 * 86400.0


@dataclass(frozen=True)
class Base:
    """A version that the store has, and its tensors."""

    version: int
    tensors: Sequence[Tensor]


@dataclass(frozen=True)
class Parcel:
    """A header and the payload's parts, in order."""

    header: weights_pb2.PublishHeader
    parts: list[bytes]
    assets_sha256: bytes

    async def messages(self) -> AsyncIterator[weights_pb2.PublishRequest]:
        """The stream of a Publish call."""
        yield weights_pb2.PublishRequest(header=self.header)
        for block in payload.blocks(self.parts):
            yield weights_pb2.PublishRequest(chunk=block)


def pack(
    job: JobRef,
    key: SigningKey,
    draft: VersionDraft,
    tensors: Sequence[Tensor],
    assets: Mapping[str, bytes],
    serial: int | None,
    base: Base | Beside | None = None,
) -> Parcel:
    """Hashes, encodes and signs a version, and a head that names it. Blocks for as long as that takes.

    Args:
        serial: head's; None leaves head where it is.
        base: a published version to encode a delta from, if its tensors have the same layout; or one that the version
            is an adapter of, merged.

    Raises:
        ValueError: the draft, a tensor or an adapter makes no sense.
        Rejected: the assets cannot be a bundle.
    """
    archive = bundle.pack(assets)
    assets_sha256 = hashlib.sha256(archive).digest()
    # Hashing and encoding read the same tensors, and neither holds the interpreter's lock.
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(lambda: [payload.tensor_info(tensor) for tensor in tensors])
        encoding, parts = _encoded(tensors, base)
        manifest = build_manifest(job, draft, hashing.result(), assets_sha256)
    header = weights_pb2.PublishHeader(
        manifest=sign_manifest(key, manifest),
        encoding=encoding,
        assets=archive,
    )
    if serial is not None:
        expires_at = time.time() + HEAD_LIFETIME_S
        header.head.CopyFrom(sign_pointer(key, job, HEAD, draft.version, serial, expires_at))
    return Parcel(header, parts, assets_sha256)


def again(manifest: weights_pb2.SignedManifest, tensors: Sequence[Tensor]) -> Parcel:
    """A version that was published once more in full, for a store that has lost its encodings."""
    encoding, parts = _encoded(tensors, None)
    return Parcel(weights_pb2.PublishHeader(manifest=manifest, encoding=encoding), parts, b"")


def _encoded(tensors: Sequence[Tensor], base: Base | Beside | None) -> tuple[weights_pb2.Encoding, list[bytes]]:
    if isinstance(base, Beside):
        # Late, because it needs NumPy.
        from longshore.weight_store.codec import adapter

        parts = [adapter.encode(base.tensors, base.products)]
        encoding = weights_pb2.Encoding(
            kind=weights_pb2.ENCODING_KIND_ADAPTER, base_version=base.version, codec=adapter.CODEC
        )
    elif base is not None and payload.layout_digest(base.tensors) == payload.layout_digest(tensors):
        from longshore.weight_store.codec import delta

        parts = [delta.encode(base.tensors, tensors)]
        encoding = weights_pb2.Encoding(
            kind=weights_pb2.ENCODING_KIND_DELTA, base_version=base.version, codec=delta.CODEC
        )
    else:
        parts = [payload.encode_header(tensors), *(tensor.data for tensor in tensors)]
        encoding = weights_pb2.Encoding(kind=weights_pb2.ENCODING_KIND_FULL, codec=payload.CODEC)
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    encoding.sha256 = whole.digest()
    encoding.size = sum(len(part) for part in parts)
    return encoding, parts
