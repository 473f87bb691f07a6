"""The site's own weight store, as `mirror.Site`: a folder beside the spool, served to the site's generators."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence

from longshore.errors import NotFound
from longshore.proto.v1 import weights_pb2
from longshore.relay.inflow import Inflow
from longshore.types import JobRef
from longshore.weight_store.decoding import PLANES, walk
from longshore.weight_store.incoming import CHUNK_BYTES
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.paths import checked_path
from longshore.weight_store.planner import Step
from longshore.weight_store.servicer import WeightsServicer
from longshore.weight_store.store import POLICY, WeightStore
from longshore.weight_store.version import open_manifest, open_pointer, parse_manifest, tensor_infos
from longshore.weights.client import KeyRing


class SiteWeights:
    """One job's versions on this site."""

    def __init__(
        self, store: WeightStore, servicer: WeightsServicer, job: JobRef, public_key: bytes, keep: int
    ) -> None:
        """
        Args:
            public_key: one of the job's keys, from the job's file.
        """
        self._store = store
        self._servicer = servicer
        self._job = job
        self._keys = KeyRing(job, public_key)
        self._keep = keep

    async def versions(self) -> list[int]:
        """See mirror.Site."""
        return await asyncio.to_thread(self._store.versions, self._job, POLICY, None, 1000)

    def knows(self, key_id: str) -> bool:
        """See mirror.Site."""
        return key_id in self._keys

    def version_of(self, signed: weights_pb2.SignedManifest, path: Sequence[weights_pb2.PathStep]) -> int:
        """See mirror.Site."""
        manifest = open_manifest(self._keys.key(signed.key_id), signed, self._job)
        checked_path(path, manifest.version, tensor_infos(manifest))
        return manifest.version

    def pointed(self, signed: weights_pb2.SignedPointer) -> int:
        """See mirror.Site."""
        return open_pointer(self._keys.key(signed.key_id), signed, self._job).version

    async def lacks_assets(self, manifest: weights_pb2.SignedManifest) -> bytes | None:
        """See mirror.Site."""
        sha256 = parse_manifest(manifest.manifest).assets_sha256
        try:
            await asyncio.to_thread(self._store.find, self._job, sha256)
        except NotFound:
            return sha256
        return None

    async def take(self, header: weights_pb2.PublishHeader, inflow: Inflow, *, heads: bool) -> None:
        """See mirror.Site."""
        await self._servicer.take(header, inflow.chunks(), heads=heads, confirmed=inflow.confirmed)

    async def rebuild(
        self, version: weights_pb2.GetVersionResponse, payloads: Sequence[bytes], assets: bytes, *, heads: bool
    ) -> None:
        """See mirror.Site."""
        data = await asyncio.to_thread(self._decoded, version, payloads)
        encoding = weights_pb2.Encoding(
            kind=weights_pb2.ENCODING_KIND_FULL, codec=PLANES, sha256=hashlib.sha256(data).digest(), size=len(data)
        )
        header = weights_pb2.PublishHeader(manifest=version.manifest, encoding=encoding, assets=assets)
        await self._servicer.take(header, _blocks(data), heads=heads)

    async def point(self, signed: weights_pb2.SignedPointer) -> None:
        """See mirror.Site."""
        await self._servicer.point(signed)

    async def adopt_keys(self, keys: weights_pb2.GetKeysResponse) -> None:
        """See mirror.Site."""
        await asyncio.to_thread(self._adopt, keys)

    def _adopt(self, keys: weights_pb2.GetKeysResponse) -> None:
        # The store would take a version by any key of the chain; those before the trusted one are stopped above it.
        self._keys.extend(keys.public_key, keys.rotations)
        self._store.register_key(self._job, keys.public_key, self._keep)
        for rotation in keys.rotations:
            self._store.rotate_key(rotation)

    def _decoded(self, version: weights_pb2.GetVersionResponse, payloads: Sequence[bytes]) -> bytes:
        from longshore.weight_store.codec import planes

        path = [Step(item.version, item.encoding) for item in version.path]
        by_address = {step.encoding.sha256: data for step, data in zip(path, payloads, strict=True)}
        first = path[0].encoding
        start = None
        if first.HasField("base_version"):
            start = self._store.copies.get(self._job, VersionKey(POLICY, first.base_version))
        infos = tensor_infos(parse_manifest(version.manifest.manifest))
        copy = walk(path, lambda encoding: by_address[encoding.sha256], start, infos)
        return planes.encode(copy.tensors)


async def _blocks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]
