"""A weight store on an object store of one's own, and versions to publish into it as any encoding."""

from __future__ import annotations

import hashlib
import io
import random

from longshore.proto.v1 import weights_pb2
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weight_store import payload
from longshore.weight_store.codec import delta, planes
from longshore.weight_store.copies import Copies
from longshore.weight_store.decoding import DELTA, PLANES
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import Objects, open_objects
from longshore.weight_store.payload import Tensor
from longshore.weight_store.store import POLICY, WeightStore
from longshore.weight_store.version import VersionDraft, sign_manifest, sign_pointer
from longshore.weights.parcel import Parcel, pack

JOB = JobRef("p", "j")
KEY = SigningKey.generate()
SIZE = 10_000


def history(count: int, size: int = SIZE, seed: int = 1, edits: int = 10) -> list[list[Tensor]]:
    """Tensors of versions 0, 1, ...: each differs from the one before in a few places of the first tensor."""
    source = random.Random(seed)
    weights = bytearray(source.randbytes(size))
    fixed = Tensor("norm", "float32", (8,), source.randbytes(32))
    versions = []
    for _ in range(count):
        versions.append([Tensor("w", "bfloat16", (size // 2,), bytes(weights)), fixed])
        for place in source.sample(range(size // 2), edits):
            weights[2 * place] ^= 1
    return versions


def encoding_of(data: bytes, codec: str, base: int | None = None, merged: bool = False) -> weights_pb2.Encoding:
    """What a publisher says of a payload."""
    kind = weights_pb2.ENCODING_KIND_FULL
    if base is not None:
        kind = weights_pb2.ENCODING_KIND_MERGED_DELTA if merged else weights_pb2.ENCODING_KIND_DELTA
    digest = hashlib.sha256(data).digest()
    return weights_pb2.Encoding(kind=kind, base_version=base, sha256=digest, size=len(data), codec=codec)


class Bench:
    """One job's store, on memory unless told otherwise, and a clock of our own."""

    def __init__(self, objects: Objects | None = None, keep: int = 2) -> None:
        self.now = 1_000.0
        self.objects = objects or open_objects("memory:///")
        self.restarted()
        self.store.register_key(JOB, KEY.public_key, keep=keep)

    def restarted(self, mirror: bool = False, copy_bytes: int = 10**9) -> WeightStore:
        copies: Copies[tuple[JobRef, VersionKey]] = Copies(16, copy_bytes)
        self.store = WeightStore(self.objects, clock=lambda: self.now, copies=copies, mirror=mirror)
        return self.store

    def publish(self, parcel: Parcel) -> bool:
        return self.store.commit(self.store.admit(parcel.header), io.BytesIO(b"".join(parcel.parts)))

    def point(self, name: str, version: int, expires_at: float = 2e9, serial: int = 1, key: SigningKey = KEY) -> None:
        self.store.set_pointer(sign_pointer(key, JOB, name, version, serial, expires_at))

    def numbers(self, weight_set: int = POLICY) -> list[int]:
        return self.store.versions(JOB, weight_set, None, 100)

    def head(self) -> int:
        state = self.store.pointer(JOB, "head")
        assert state is not None
        return state[0].version

    def tensors(self, version: int) -> tuple[Tensor, ...]:
        """As a newcomer would decode them: no copy in memory is used."""
        store = WeightStore(self.objects, clock=lambda: self.now)
        return store.copies.get(JOB, VersionKey(POLICY, version)).tensors


def full_parcel(
    version: int,
    tensors: list[Tensor],
    *,
    codec: str = payload.CODEC,
    serial: int | None = None,
    epoch: int = 1,
    key: SigningKey = KEY,
    job: JobRef = JOB,
) -> Parcel:
    """A version as a full encoding."""
    draft = VersionDraft(version, version, epoch, None, (), 1.0)
    packed = pack(job, key, draft, tensors, {"config.json": b"{}"}, version if serial is None else serial)
    if codec == PLANES:
        return _with(packed, planes.encode(tensors), PLANES)
    return packed


def delta_parcel(
    version: int,
    tensors: list[Tensor],
    base: int,
    base_tensors: list[Tensor],
    *,
    merged: bool = False,
    serial: int | None = None,
    epoch: int = 1,
    key: SigningKey = KEY,
    job: JobRef = JOB,
) -> Parcel:
    """A version as a delta."""
    packed = full_parcel(version, tensors, serial=serial, epoch=epoch, key=key, job=job)
    return _with(packed, delta.encode(base_tensors, tensors), DELTA, base, merged)


def of_weight_set(packed: Parcel, weight_set: weights_pb2.WeightSet.ValueType, key: SigningKey = KEY) -> Parcel:
    """The same version in another weight set; head names policies only, so it goes without."""
    manifest = weights_pb2.Manifest.FromString(packed.header.manifest.manifest)
    manifest.weight_set = weight_set
    packed.header.manifest.CopyFrom(sign_manifest(key, manifest))
    packed.header.ClearField("head")
    return packed


def _with(packed: Parcel, data: bytes, codec: str, base: int | None = None, merged: bool = False) -> Parcel:
    packed.header.encoding.CopyFrom(encoding_of(data, codec, base, merged))
    return Parcel(packed.header, [data], packed.assets_sha256)
