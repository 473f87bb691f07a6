"""Gets one version by the cheapest path from what is held: asks, downloads, decodes, proves.

A transfer that breaks goes on where it broke, also in a later attempt. What cannot be decoded, or gives another result
than the manifest says, is counted, and the version is asked for once more as if nothing were held.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog

from longshore.errors import IntegrityError, NotFound, Rejected, Unavailable
from longshore.proto.v1 import job_pb2, weights_pb2, weights_pb2_grpc
from longshore.types import JobRef
from longshore.weight_store import metrics
from longshore.weight_store.copies import Copies, HostCopy
from longshore.weight_store.decoding import CODECS, walk
from longshore.weight_store.paths import base_of, checked_path
from longshore.weight_store.payload import TensorInfo
from longshore.weight_store.planner import Step, legs
from longshore.weight_store.version import tensor_infos
from longshore.weights.calls import repeat
from longshore.weights.manifests import Manifests

log = structlog.get_logger()


class Fetching:
    """Transfers of one client."""

    def __init__(
        self,
        stub: weights_pb2_grpc.WeightsServiceAsyncStub,
        job: JobRef,
        manifests: Manifests,
        copies: Copies[int],
    ) -> None:
        self._stub = stub
        self._job = job
        self._manifests = manifests
        self._copies = copies
        # What came of objects that were not downloaded whole, by SHA-256; of one path at a time.
        self._partial: dict[bytes, bytearray] = {}

    async def version(self, version: int, timeout: float) -> tuple[weights_pb2.Manifest, HostCopy]:
        """Raises NotFound, IntegrityError, Rejected, Unavailable."""
        deadline = time.monotonic() + timeout
        try:
            return await self._attempt(version, self._copies.keys(), deadline)
        except (IntegrityError, Rejected) as error:
            if not self._copies.keys():
                raise
            metrics.fault(self._job, "delta")
            log.warning("falling back to an anchor", version=version, reason=str(error))
            self._partial.clear()
            return await self._attempt(version, (), deadline)

    async def download(self, sha256: bytes, limit: int, timeout: float) -> bytearray:
        """An object's bytes, at most `limit` of them. Raises NotFound, IntegrityError, Unavailable."""
        data = self._partial.setdefault(sha256, bytearray())

        async def attempt(left: float) -> bytearray:
            request = weights_pb2.FetchRequest(job=self._job_proto, sha256=sha256, offset=len(data))
            total = None
            async for response in self._stub.Fetch(request, timeout=left):
                total = response.total_size if total is None else total
                data.extend(response.chunk)
                if len(data) > min(total, limit):
                    raise IntegrityError(f"{sha256.hex()} has more bytes than it can have")
            if len(data) != total:
                raise Unavailable(f"{sha256.hex()} ended after {len(data)} bytes of {total}")
            return data

        try:
            whole = await repeat(attempt, timeout)
        except (IntegrityError, Rejected, NotFound):
            self._partial.pop(sha256, None)
            raise
        self._partial.pop(sha256, None)
        return whole

    async def _attempt(
        self, version: int, have: Sequence[int], deadline: float, *, in_legs: bool = True
    ) -> tuple[weights_pb2.Manifest, HostCopy]:
        """
        Args:
            in_legs: what an adapter is decoded against is brought as a version of its own first, and held.
        """
        request = weights_pb2.GetVersionRequest(
            job=self._job_proto,
            version=version,
            weight_set=weights_pb2.WEIGHT_SET_POLICY,
            have=have,
            codecs=CODECS,
        )
        response = await repeat(lambda left: self._stub.GetVersion(request, timeout=left), deadline - time.monotonic())
        manifest = await self._manifests.opened(response.manifest, version)
        infos = tensor_infos(manifest)
        if not response.path and version in have:
            return manifest, self._held(version, infos)
        if not response.path:
            raise NotFound(f"{self._job} has version {version}, but no way to it from {list(have) or 'nothing'}")
        path = checked_path(response.path, version, infos)
        if in_legs and await self._brought_bases(path, have, deadline):
            return await self._attempt(version, self._copies.keys(), deadline, in_legs=False)
        base = base_of(path)
        start = None if base is None else self._copies.get(base)
        if base is not None and start is None:
            raise IntegrityError(f"the path starts from version {base}, which is not held")
        wanted = {step.encoding.sha256 for step in path}
        self._partial = {sha256: data for sha256, data in self._partial.items() if sha256 in wanted}
        payloads = {}
        for step in path:
            sha256 = step.encoding.sha256
            payloads[sha256] = await self.download(sha256, step.encoding.size, deadline - time.monotonic())
        read = lambda encoding: payloads[encoding.sha256]  # noqa: E731
        return manifest, await asyncio.to_thread(walk, path, read, start, infos)

    async def _brought_bases(self, path: Sequence[Step], have: Sequence[int], deadline: float) -> bool:
        """Gets what a path's adapters are decoded against as versions of their own, to be held. True when any was."""
        if not self._copies.max_bytes:
            return False
        brought = False
        for leg in legs(path)[:-1]:
            base = leg[-1].version
            _, copy = await self._attempt(base, have, deadline, in_legs=False)
            self._copies.put(base, copy)
            # One that is too large to be held is decoded on the way.
            brought = brought or self._copies.get(base) is not None
        return brought

    def _held(self, version: int, infos: Sequence[TensorInfo]) -> HostCopy:
        """Raises IntegrityError: what is held under that number is another version."""
        copy = self._copies.get(version)
        if copy is None or list(copy.infos) != list(infos):
            raise IntegrityError(f"what is held as version {version} is not what the store has as it")
        return copy

    @property
    def _job_proto(self) -> job_pb2.JobRef:
        return self._manifests.job_proto
