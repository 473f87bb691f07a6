"""Keeps a site's weight store at the versions of its home: each payload crosses the link once, and is checked here.

    home ══Watch, push══► mirror ──► the site's store ──► generators (Watch, push)

| loop      | consumes                      | produces                   | waits for                            |
| `_follow` | one pointer's stream at home  | versions and pointers here | the stream; pauses while home is away |

A version's bytes go on to the site's generators while they come. It counts as published here when home has said so and
this store has proven it. With home away, the site's versions are served as they are. Knows neither gRPC nor how a store
keeps things.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import structlog

from longshore.errors import Conflict, IntegrityError, LongshoreError, NotFound, Rejected, Unavailable
from longshore.proto.v1 import weights_pb2
from longshore.relay.inflow import Inflow
from longshore.weight_store.objects import StorageFull
from longshore.weight_store.planner import legs
from longshore.weight_store.version import EVALUATED, HEAD

log = structlog.get_logger()

POINTERS = (HEAD, "serving", EVALUATED)
# Names are the site's generators' to choose; each costs a stream.
MAX_POINTERS = 64
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
# For one version that was asked for, or that did not come whole by itself.
BRING_S = 600.0
# When a stream breaks, home may still be committing what it was sending.
COMMIT_S = 5.0

T = TypeVar("T")


class Home(Protocol):
    """The home site's weight store. Every method raises Unavailable when it is away, NotFound for what it lacks."""

    def watch(
        self, pointer: str, have: Sequence[int] | None
    ) -> contextlib.AbstractAsyncContextManager[AsyncIterator[weights_pb2.WatchResponse]]:
        """`have` None: pointers alone; else versions are pushed as well."""

    async def version(self, version: int, have: Sequence[int]) -> weights_pb2.GetVersionResponse: ...

    def fetch(self, sha256: bytes, offset: int) -> AsyncIterator[bytes]: ...

    async def assets(self, sha256: bytes) -> bytes: ...

    async def keys(self) -> weights_pb2.GetKeysResponse: ...


class Site(Protocol):
    """The site's own weight store."""

    async def versions(self) -> list[int]:
        """On hand, newest first."""

    def knows(self, key_id: str) -> bool:
        """Whether a key's signatures are believed."""

    def version_of(self, signed: weights_pb2.SignedManifest, path: Sequence[weights_pb2.PathStep]) -> int:
        """The version that a manifest describes. Raises IntegrityError, Rejected: it is not to be believed."""

    def pointed(self, signed: weights_pb2.SignedPointer) -> int:
        """The version that a pointer names. Raises IntegrityError, Rejected: it is not to be believed."""

    async def lacks_assets(self, manifest: weights_pb2.SignedManifest) -> bytes | None:
        """SHA-256 of the asset bundle that the version needs and the site has not seen; None: it has."""

    async def take(self, header: weights_pb2.PublishHeader, inflow: Inflow, *, heads: bool) -> None:
        """Publishes what flows in. Raises as the store does, and what the inflow was failed with.

        Args:
            heads: head will name the version soon: who watches it is sent the bytes meanwhile.
        """

    async def rebuild(
        self, version: weights_pb2.GetVersionResponse, payloads: Sequence[bytes], assets: bytes, *, heads: bool
    ) -> None:
        """Publishes in full what a path of several encodings decodes to."""

    async def point(self, signed: weights_pb2.SignedPointer) -> None: ...

    async def adopt_keys(self, keys: weights_pb2.GetKeysResponse) -> None: ...


@dataclass(frozen=True)
class _Coming:
    """A version on its way in."""

    version: int
    manifest: weights_pb2.SignedManifest
    inflow: Inflow
    # Ends when the site has it, or cannot take it.
    taking: asyncio.Task[None]


class Mirror:
    """One job's versions at one site."""

    def __init__(self, home: Home, site: Site, on_link: Callable[[bool], None], on_fault: Callable[[], None]) -> None:
        """
        Args:
            on_link: told whether home answers.
            on_fault: told of every version that could not be taken over as it came, and of every pointer that was
                passed over.
        """
        self._home = home
        self._site = site
        self._on_link = on_link
        self._on_fault = on_fault
        # What comes on the stream of head; no other stream has bytes.
        self._coming: _Coming | None = None
        # Set while it runs.
        self._loops: asyncio.TaskGroup | None = None
        self._followed: dict[str, asyncio.Task[None]] = {}
        # Versions that are being brought, so that several who ask cause one transfer.
        self._bringing: dict[int, asyncio.Task[None]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Mirrors until `stop`."""
        async with asyncio.TaskGroup() as group:
            self._loops = group
            for pointer in POINTERS:
                self.follow(pointer)
            await stop.wait()
            self._loops = None
            for task in (*self._followed.values(), *self._bringing.values()):
                task.cancel()

    def follow(self, pointer: str) -> None:
        """Mirrors a pointer from now on, if it is not mirrored yet and there is room for another."""
        if self._loops is None or pointer in self._followed or len(self._followed) >= MAX_POINTERS:
            return
        self._followed[pointer] = self._loops.create_task(self._follow(pointer), name=f"follow {pointer}")

    async def bring(self, version: int) -> None:
        """Gets a version that the site lacks. Raises NotFound, Unavailable, and what the store refuses it for."""
        await self._bring(version, heads=False)

    async def _follow(self, pointer: str) -> None:
        pause = FIRST_PAUSE_S
        while True:
            try:
                await self._adopt_keys()
                have = await self._site.versions() if pointer == HEAD else None
                async with self._home.watch(pointer, have) as responses:
                    async for response in responses:
                        self._on_link(True)
                        if pointer == HEAD:
                            await self._take(response)
                        if response.HasField("pointer"):
                            await self._point(pointer, response.pointer)
                            pause = FIRST_PAUSE_S
            except LongshoreError as error:
                self._on_link(isinstance(error, StorageFull) or not isinstance(error, Unavailable))
                log.info("mirroring broke off", pointer=pointer, reason=str(error))
            except asyncio.CancelledError:
                if pointer == HEAD:
                    await self._end(Unavailable("the relay stops"))
                raise
            if pointer == HEAD:
                await self._leave()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _adopt_keys(self) -> None:
        keys = await self._home.keys()
        try:
            await self._site.adopt_keys(keys)
        except (Conflict, IntegrityError, Rejected) as error:
            self._refused("the job's keys as home tells them are not believed", error)
            raise

    async def _take(self, response: weights_pb2.WatchResponse) -> None:
        """Takes what head's stream says of versions; of each the bytes come before the pointer."""
        if response.push_broken:
            await self._end(Unavailable("home did not publish what it had sent"))
        elif self._coming is not None and self._coming.inflow.whole:
            # Home says nothing more of a version that it has published; what comes next proves it.
            self._coming.inflow.confirm()
        if response.HasField("push"):
            await self._settle()
            await self._begin(response.push)
        if response.chunk and self._coming is not None:
            # What cannot be taken in this way is asked for in another when the pointer has come. Without room for it
            # there is no other way.
            with contextlib.suppress(Conflict, IntegrityError, NotFound, Rejected):
                await self._coming.inflow.add(response.chunk)
        if response.HasField("pointer"):
            await self._settle()

    async def _begin(self, push: weights_pb2.VersionPush) -> None:
        try:
            self._coming = await self._open(push.manifest, push.path, heads=True)
        except (IntegrityError, Rejected) as error:
            self._refused("a version that was sent cannot be what it says", error)

    async def _open(
        self, manifest: weights_pb2.SignedManifest, path: Sequence[weights_pb2.PathStep], *, heads: bool
    ) -> _Coming:
        """Makes ready to take a version in. Raises IntegrityError, Rejected: it is not to be believed."""
        if not self._site.knows(manifest.key_id):
            await self._adopt_keys()
        version = self._site.version_of(manifest, path)
        missing = await self._site.lacks_assets(manifest)
        assets = b"" if missing is None else await self._home.assets(missing)
        inflow = Inflow(path)
        told = weights_pb2.GetVersionResponse(manifest=manifest, path=path)
        taking = asyncio.create_task(self._take_in(told, inflow, assets, heads), name=f"take {version}")
        return _Coming(version, manifest, inflow, taking)

    async def _take_in(self, told: weights_pb2.GetVersionResponse, inflow: Inflow, assets: bytes, heads: bool) -> None:
        try:
            if len(told.path) == 1:
                header = weights_pb2.PublishHeader(
                    manifest=told.manifest, encoding=told.path[0].encoding, assets=assets
                )
                await self._site.take(header, inflow, heads=heads)
            else:
                payloads = await inflow.payloads()
                await inflow.confirmed()
                await self._site.rebuild(told, payloads, assets, heads=heads)
        except LongshoreError as error:
            # Who sends the bytes must not wait for a reader that has gone.
            inflow.fail(error)
            raise

    async def _point(self, name: str, signed: weights_pb2.SignedPointer) -> None:
        try:
            if not self._site.knows(signed.key_id):
                await self._adopt_keys()
            version = self._site.pointed(signed)
        except (IntegrityError, Rejected) as error:
            self._refused(f"the pointer {name} was passed over", error)
            return
        if version not in await self._site.versions():
            try:
                await self._bring(version, heads=name == HEAD)
            except (Conflict, IntegrityError, Rejected) as error:
                self._refused(f"version {version}, which {name} names, could not be taken over", error)
                # The next stream tries again.
                raise
        try:
            await self._site.point(signed)
        except (Conflict, IntegrityError, Rejected) as error:
            self._refused(f"the pointer {name} was passed over", error)

    def _refused(self, what: str, error: LongshoreError) -> None:
        self._on_fault()
        log.warning(what, reason=str(error))

    async def _settle(self) -> None:
        """Waits for the version that came last; one that could not be taken over is left to `_bring`."""
        coming, self._coming = self._coming, None
        if coming is None:
            return
        if not coming.inflow.whole:
            coming.inflow.fail(Rejected("chunk", "less came than was announced"))
        try:
            await coming.taking
        except LongshoreError as error:
            self._refused("a version could not be taken over as it came", error)

    async def _end(self, reason: LongshoreError) -> None:
        if self._coming is not None:
            self._coming.inflow.fail(reason)
        await self._settle()

    async def _leave(self) -> None:
        """The stream has ended: what was on its way is finished by asking for the rest of its bytes."""
        coming = self._coming
        if coming is None:
            return
        if coming.inflow.failed:
            await self._settle()
            return
        try:
            async with asyncio.timeout(BRING_S):
                await self._finish(coming.inflow, COMMIT_S)
                # Home may have the bytes and not the version, if it died in between.
                told = await _patiently(lambda: self._home.version(coming.version, ()), COMMIT_S)
            if told.manifest.manifest != coming.manifest.manifest:
                raise NotFound("home has published another version under that number")
            coming.inflow.confirm()
        except (LongshoreError, TimeoutError) as error:
            coming.inflow.fail(Unavailable(f"the rest of a version did not come: {error}"))
        await self._settle()

    async def _finish(self, inflow: Inflow, patience_s: float = 0.0) -> None:
        """Gets the bytes that are still to come.

        Raises NotFound (home does not have them, also after `patience_s` seconds), IntegrityError, and what the inflow
        was failed with.
        """

        async def rest() -> None:
            while not inflow.whole:
                sha256, offset, missing = inflow.next
                before = inflow.received
                async for chunk in self._home.fetch(sha256, offset):
                    await inflow.add(chunk)
                if inflow.received - before != missing:
                    raise IntegrityError(f"{sha256.hex()} has another size at home than it should have")

        await _patiently(rest, patience_s, lambda: inflow.failed)

    async def _bring(self, version: int, *, heads: bool) -> None:
        task = self._bringing.get(version)
        if task is None:
            task = asyncio.create_task(self._brought(version, heads), name=f"bring {version}")
            self._bringing[version] = task
            task.add_done_callback(lambda _: self._bringing.pop(version, None))
        await asyncio.shield(task)

    async def _brought(self, version: int, heads: bool) -> None:
        try:
            async with asyncio.timeout(BRING_S):
                coming = self._coming
                if coming is not None and coming.version == version:
                    await asyncio.wait((coming.taking,))
                have = await self._site.versions()
                if version in have:
                    return
                told = await self._home.version(version, have)
                for leg in legs(told.path)[:-1]:
                    # What adapters are decoded against is a version of the site's too: the next one needs it again.
                    await self._bring(leg[-1].version, heads=False)
                    told = await self._home.version(version, await self._site.versions())
                try:
                    await self._transfer(version, told, heads)
                except (IntegrityError, NotFound, Rejected) as error:
                    if not have:
                        raise
                    self._refused("falling back to an anchor", error)
                    await self._transfer(version, await self._home.version(version, ()), heads)
        except TimeoutError:
            raise Unavailable(f"version {version} did not come from home within {BRING_S:.0f} s") from None

    async def _transfer(self, version: int, told: weights_pb2.GetVersionResponse, heads: bool) -> None:
        """Raises NotFound, Unavailable, and what the store refuses it for."""
        if not told.path:
            raise NotFound(f"home has no way to version {version}")
        coming = await self._open(told.manifest, told.path, heads=heads)
        try:
            if coming.version != version:
                raise IntegrityError(f"home answered with version {coming.version}, {version} was asked for")
            await self._finish(coming.inflow)
            # It was published: home has told of it.
            coming.inflow.confirm()
        except BaseException as error:
            coming.inflow.fail(error if isinstance(error, LongshoreError) else Unavailable("given up"))
            raise
        finally:
            await asyncio.gather(coming.taking, return_exceptions=True)
        coming.taking.result()


async def _patiently(
    attempt: Callable[[], Awaitable[T]], patience_s: float, given_up: Callable[[], bool] = lambda: False
) -> T:
    """Repeats an attempt while home is away, and for `patience_s` seconds while it lacks something."""
    pause, waited = FIRST_PAUSE_S, 0.0
    while True:
        try:
            return await attempt()
        except (NotFound, Unavailable) as error:
            if given_up() or (isinstance(error, NotFound) and waited >= patience_s):
                raise
            waited += pause if isinstance(error, NotFound) else 0.0
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
