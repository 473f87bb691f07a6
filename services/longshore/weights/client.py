"""The weight store as a learner, a generator or an actor sees it: the one module of `weights` that others import.

async for version in client.watch_head():
    policy = await client.fetch(version)      # every tensor checked against the learner's signature

What comes back was verified against the job's public key, so that neither the store nor anything between has to be
trusted. Hashing, packing and decoding run in threads. Needs neither torch nor obstore, and NumPy only
where weights are encoded or decoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial

import structlog

from longshore.errors import Conflict, Fenced, IntegrityError, NotFound, Unavailable
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.rpc import convert
from longshore.rpc.channel import channel
from longshore.signing import SigningKey, key_id
from longshore.types import JobRef
from longshore.weight_store import bundle
from longshore.weight_store.copies import Copies
from longshore.weight_store.keychain import sign_rotation, verify_chain
from longshore.weight_store.payload import Tensor
from longshore.weight_store.product import Beside, Product
from longshore.weight_store.version import (
    HEAD,
    CanaryProbe,
    PointerState,
    PolicyVersion,
    VersionDraft,
    checksum_of,
    pointer_state,
    policy_version,
    sign_pointer,
)
from longshore.weights.calls import repeat, translated
from longshore.weights.fetching import Fetching
from longshore.weights.keys import KeyRing
from longshore.weights.manifests import Manifests
from longshore.weights.parcel import Base, Parcel, again, pack
from longshore.weights.watching import News, PointerWatch

__all__ = [
    "Beside",
    "CanaryProbe",
    "Copies",
    "KeyRing",
    "News",
    "PointerState",
    "PolicyVersion",
    "Product",
    "Tensor",
    "VersionDraft",
    "WeightsClient",
    "checksum_of",
    "translated",
]

# Bounds what a broken store could make us hold: an archive is a little larger than its files.
_MAX_ARCHIVE_BYTES = bundle.MAX_BUNDLE_BYTES + 1024 * 1024

log = structlog.get_logger()


class WeightsClient:
    """One job's versions.

    Calls raise NotFound, Conflict, Fenced, Rejected (the store's answer), IntegrityError (what came does not match its
    signature or checksum) and Unavailable (no answer within `timeout` seconds; they try until then).
    """

    def __init__(self, address: str, job: JobRef, public_key: bytes, copies: Copies[int] | None = None) -> None:
        """
        Args:
            public_key: one of the job's keys, from a source that is trusted.
            copies: where fetched versions are held, so that later ones come as deltas, and before they are asked for.
        """
        self.job = job
        self._public_key = public_key
        self._channel = channel(address)
        self._stub = weights_pb2_grpc.WeightsServiceStub(self._channel)
        self._job = convert.job_to_proto(job)
        self._manifests = Manifests(self._stub, job, KeyRing(job, public_key))
        self._copies: Copies[int] = Copies(0, 0) if copies is None else copies
        self._fetching = Fetching(self._stub, job, self._manifests, self._copies)
        self._watches: dict[str, PointerWatch] = {}
        # What was published last, which the next version is encoded against.
        self._sent: Base | None = None
        # The bundle that the store has from us: our versions keep it there.
        self._sent_assets: bytes | None = None

    async def close(self) -> None:
        """Ends every call and watch."""
        for watch in self._watches.values():
            watch.close()
        await self._channel.close()

    async def register_key(self, keep: int, timeout: float = 30.0) -> None:
        """Tells the store the job's public key and how many versions to keep. Raises Conflict: it has another key."""
        request = weights_pb2.RegisterKeyRequest(job=self._job, public_key=self._public_key, keep=keep)
        await repeat(lambda left: self._stub.RegisterKey(request, timeout=left), timeout)

    async def publish(
        self,
        key: SigningKey,
        draft: VersionDraft,
        tensors: Sequence[Tensor],
        assets: Mapping[str, bytes],
        timeout: float = 120.0,
        *,
        beside: Beside | None = None,
        heads: bool = True,
    ) -> bool:
        """Publishes a version and moves head to it. True when this very version was there already.

        Sent as a delta from what this client published before, or as an adapter; in full the first time, and where the
        store has lost what either is decoded against.

        Args:
            beside: the published version and the products that `tensors` are the sum of (codec.adapter.merge).
            heads: False leaves head where it is.

        Raises:
            ValueError: the draft, a tensor or a product makes no sense.
            Fenced: a newer learner epoch has published: stop.
            Conflict: another manifest holds the number.
        """
        deadline = time.monotonic() + timeout
        serial = await self._next_serial(timeout) if heads else None
        make = partial(pack, self.job, key, draft, tensors, assets, serial)
        older = self._sent if self._sent is not None and self._sent.version < draft.version else None
        parcel = await asyncio.to_thread(make, beside or older)
        try:
            existed = await self._send(parcel, deadline)
        except NotFound:
            if beside is None or not await self._mended(beside, deadline):
                log.info("published in full: the store lacks the base", job=str(self.job), version=draft.version)
                parcel = await asyncio.to_thread(make, None)
            existed = await self._send(parcel, deadline)
        # Beside a base nothing is encoded against the version before.
        self._sent = Base(draft.version, tensors) if beside is None else None
        self._sent_assets = parcel.assets_sha256
        if heads:
            self._pointer_watch(HEAD).note(pointer_state(parcel.header.head))
        return existed

    async def rotate_key(self, old: SigningKey, new: SigningKey, timeout: float = 30.0) -> None:
        """Hands the job's signing over from its newest key to another; nothing happens where that was done before.

        Raises:
            Conflict: `old` is not the job's newest key.
        """
        keys = await repeat(
            lambda left: self._stub.GetKeys(weights_pb2.GetKeysRequest(job=self._job), timeout=left), timeout
        )
        newest = verify_chain(self.job, keys.public_key, keys.rotations)[-1]
        if newest == new.public_key:
            return
        if newest != old.public_key:
            raise Conflict(f"key {old.key_id} is not the newest key of {self.job}, which is {key_id(newest)}")
        rotation = sign_rotation(old, self.job, new.public_key, len(keys.rotations) + 1, time.time())
        request = weights_pb2.RotateKeyRequest(rotation=rotation)
        await repeat(lambda left: self._stub.RotateKey(request, timeout=left), timeout)

    async def describe(self, version: int, timeout: float = 30.0) -> PolicyVersion:
        """A version's manifest, verified; its `tensors` is None."""
        request = weights_pb2.GetVersionRequest(
            job=self._job, version=version, weight_set=weights_pb2.WEIGHT_SET_POLICY
        )
        response = await repeat(lambda left: self._stub.GetVersion(request, timeout=left), timeout)
        return policy_version(await self._manifests.opened(response.manifest, version), None)

    async def fetch(self, version: int, timeout: float = 120.0) -> PolicyVersion:
        """A version with all its tensors, each verified.

        At once where its bytes were pushed; else by the cheapest path from the copies that are held. A broken transfer
        goes on where it broke, also in a later call.
        """
        arrived = None
        for watch in list(self._watches.values()):
            arrived = arrived or await watch.arrived(version)
        manifest, copy = arrived or await self._fetching.version(version, timeout)
        if arrived is None or any(watch.names(version) for watch in self._watches.values()):
            # What was pushed is held only once it is known to be published.
            self._copies.put(version, copy)
        return policy_version(manifest, copy.tensors)

    async def head(self, timeout: float = 30.0) -> int:
        """The version that head names now. Raises NotFound at once when the job has none yet, or it has expired."""
        state = await repeat(lambda left: self._read(HEAD, left), timeout)
        if state is None or state.expires_at <= time.time():
            raise NotFound(f"{self.job} has no head" if state is None else f"the head of {self.job} has expired")
        return state.version

    def watch(self, pointer: str = HEAD) -> AsyncIterator[News]:
        """Yields versions as their bytes come (if copies are held), and as the pointer names them.

        The newest when several were missed. Lasts until the client is closed, through any absence of the store. A
        pointer that is not signed by the job, has expired, or has a serial below one seen before is passed over.
        """
        return self._pointer_watch(pointer).news()

    async def watch_head(self) -> AsyncIterator[int]:
        """The versions that head names, as `watch` tells them."""
        async with contextlib.aclosing(self._pointer_watch(HEAD).news()) as news:
            async for item in news:
                if item.published:
                    yield item.version

    async def assets(self, sha256: str, timeout: float = 60.0) -> dict[str, bytes]:
        """The files of an asset bundle (PolicyVersion.assets_sha256), verified."""
        digest = bytes.fromhex(sha256)
        archive = await self._fetching.download(digest, _MAX_ARCHIVE_BYTES, timeout)
        return await asyncio.to_thread(_unpack, digest, archive)

    async def pointers(self, timeout: float = 30.0) -> list[PointerState]:
        """Every pointer of the job that has not expired, each verified."""
        return [state for state in await self._all_pointers(timeout) if state.expires_at > time.time()]

    async def point(
        self, key: SigningKey, name: str, version: int, keep_s: float, timeout: float = 30.0
    ) -> PointerState:
        """Moves a pointer, forth or back, with a serial above its present one, for `keep_s` seconds.

        Raises:
            NotFound: the store does not have the version.
            Conflict: the key is not the job's newest, or somebody else moved the pointer meanwhile.
        """
        last = max((state.serial for state in await self._all_pointers(timeout) if state.name == name), default=-1)
        serial = max(time.time_ns() // 1_000_000, last + 1)
        signed = sign_pointer(key, self.job, name, version, serial, time.time() + keep_s)
        request = weights_pb2.SetPointerRequest(pointer=signed)
        await repeat(lambda left: self._stub.SetPointer(request, timeout=left), timeout)
        return pointer_state(signed)

    async def versions(self, limit: int = 100, timeout: float = 30.0, before: int | None = None) -> list[int]:
        """Versions on hand below `before`, newest first; at most 1000."""
        request = weights_pb2.ListVersionsRequest(
            job=self._job, weight_set=weights_pb2.WEIGHT_SET_POLICY, limit=limit, before=before
        )
        response = await repeat(lambda left: self._stub.ListVersions(request, timeout=left), timeout)
        return list(response.versions)

    async def _all_pointers(self, timeout: float) -> list[PointerState]:
        request = weights_pb2.ListPointersRequest(job=self._job)
        response = await repeat(lambda left: self._stub.ListPointers(request, timeout=left), timeout)
        return [await self._manifests.pointer(item, pointer_state(item).name) for item in response.pointers]

    async def _mended(self, base: Beside, deadline: float) -> bool:
        """Sends a version's tensors again, of which the store has the manifest and no way to them. False where it has
        no manifest either."""
        request = weights_pb2.GetVersionRequest(
            job=self._job, version=base.version, weight_set=weights_pb2.WEIGHT_SET_POLICY
        )
        try:
            found = await repeat(lambda left: self._stub.GetVersion(request, timeout=left), deadline - time.monotonic())
            parcel = await asyncio.to_thread(again, found.manifest, base.tensors)
            await self._send(parcel, deadline)
        except (NotFound, IntegrityError) as error:
            log.warning("a base was not mended", job=str(self.job), version=base.version, reason=str(error))
            return False
        return True

    async def _send(self, parcel: Parcel, deadline: float) -> bool:
        """Publishes a parcel; True when its version was there already."""
        if parcel.assets_sha256 == self._sent_assets:
            parcel.header.ClearField("assets")

        async def attempt(left: float) -> weights_pb2.PublishResponse:
            response: weights_pb2.PublishResponse = await self._stub.Publish(parcel.messages(), timeout=left)
            return response

        return (await repeat(attempt, deadline - time.monotonic(), precondition=Fenced)).existed

    async def _next_serial(self, timeout: float) -> int:
        """Above every serial of head so far, even where this machine's clock is behind."""
        watch = self._pointer_watch(HEAD)
        if watch.state is None:
            await repeat(lambda left: self._read(HEAD, left), timeout)
        last = watch.state.serial if watch.state else -1
        return max(time.time_ns() // 1_000_000, last + 1)

    async def _read(self, pointer: str, left: float) -> PointerState | None:
        """A pointer's present state, which the first message of a Watch tells; None while there is none."""
        call = self._stub.Watch(weights_pb2.WatchRequest(job=self._job, pointer=pointer), timeout=left)
        try:
            async for response in call:
                if not response.HasField("pointer"):
                    return None
                watch = self._pointer_watch(pointer)
                watch.note(await self._manifests.pointer(response.pointer, pointer))
                return watch.state
        finally:
            call.cancel()
        raise Unavailable("the store ended a watch before its first message")

    def _pointer_watch(self, name: str) -> PointerWatch:
        if name not in self._watches:
            self._watches[name] = PointerWatch(self._stub, self.job, name, self._manifests, self._copies)
        return self._watches[name]


def _unpack(sha256: bytes, archive: bytearray) -> dict[str, bytes]:
    if hashlib.sha256(archive).digest() != sha256:
        raise IntegrityError("the asset bundle does not match its SHA-256")
    return bundle.unpack(bytes(archive))
