"""Manifests and pointers as they come from a store, checked against the job's keys.

A key that is not known yet is looked for among the job's rotations, once for each message that bears it.
"""

from __future__ import annotations

from longshore.errors import IntegrityError, Rejected
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.rpc import convert
from longshore.types import JobRef
from longshore.weight_store.version import PointerState, open_manifest, open_pointer
from longshore.weights.calls import repeat
from longshore.weights.keys import KeyRing

_KEYS_S = 10.0


class Manifests:
    """What one job's learner has signed."""

    def __init__(self, stub: weights_pb2_grpc.WeightsServiceAsyncStub, job: JobRef, keys: KeyRing) -> None:
        self.job_proto = convert.job_to_proto(job)
        self._stub = stub
        self._job = job
        self._keys = keys

    async def opened(self, signed: weights_pb2.SignedManifest, version: int | None = None) -> weights_pb2.Manifest:
        """A manifest of a policy version, checked. Raises IntegrityError: not signed by the job, or not `version`'s."""
        manifest = open_manifest(await self._key(signed.key_id), signed, self._job)
        if manifest.weight_set != weights_pb2.WEIGHT_SET_POLICY or version not in (None, manifest.version):
            raise IntegrityError(f"the store answered with version {manifest.version}, {version} was asked for")
        return manifest

    async def pointer(self, signed: weights_pb2.SignedPointer, name: str) -> PointerState:
        """A pointer, checked; its expiry and serial are the reader's to judge. Raises IntegrityError, Rejected."""
        state = open_pointer(await self._key(signed.key_id), signed, self._job)
        if state.name != name:
            raise Rejected("pointer", f"{name} was asked for, {state.name} came")
        return state

    async def _key(self, key_id: str) -> bytes:
        if key_id not in self._keys:
            request = weights_pb2.GetKeysRequest(job=self.job_proto)
            answer = await repeat(lambda left: self._stub.GetKeys(request, timeout=left), _KEYS_S)
            self._keys.extend(answer.public_key, answer.rotations)
        return self._keys.key(key_id)
