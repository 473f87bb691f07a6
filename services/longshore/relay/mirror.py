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
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import structlog

from longshore.errors import LongshoreError, NotFound, Unavailable
from longshore.proto.v1 import weights_pb2
from longshore.relay.inflow import Inflow

log = structlog.get_logger()

HEAD = "head"
POINTERS = (HEAD, "serving")
# Names are the site's generators' to choose; each costs a stream.
MAX_POINTERS = 64
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
# For one version that was asked for, or that did not come whole by itself.
BRING_S = 600.0


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

    async def lacks_assets(self, manifest: weights_pb2.SignedManifest) -> bytes | None:
        """SHA-256 of the asset bundle that the version needs and the site has not seen; None: it has."""

    async def take(self, header: weights_pb2.PublishHeader, inflow: Inflow) -> None:
        """Publishes what flows in. Raises as the store does, and what the inflow was failed with."""

    async def rebuild(self, response: weights_pb2.GetVersionResponse, payloads: Sequence[bytes], assets: bytes) -> None:
        """Publishes in full what a path of several encodings decodes to."""

    async def point(self, signed: weights_pb2.SignedPointer) -> None: ...

    async def adopt_keys(self, keys: weights_pb2.GetKeysResponse) -> None: ...


class Mirror:
    """One job's versions at one site."""

    def __init__(self, home: Home, site: Site, on_link: Callable[[bool], None], on_fault: Callable[[], None]) -> None:
        """
        Args:
            on_link: told whether home answers.
            on_fault: told of every version that could not be taken over as it came.
        """
        self._home = home
        self._site = site
        self._on_link = on_link
        self._on_fault = on_fault
        self._inflow: Inflow | None = None
        self._taking: asyncio.Task[None] | None = None
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
            for loop in self._followed.values():
                loop.cancel()

    def follow(self, pointer: str) -> None:
        """Mirrors a pointer from now on, if it is not mirrored yet and there is room for another."""
        if self._loops is None or pointer in self._followed or len(self._followed) >= MAX_POINTERS:
            return
        self._followed[pointer] = self._loops.create_task(self._follow(pointer), name=f"follow {pointer}")

    async def bring(self, version: int) -> None:
        """Gets a version that the site lacks. Raises NotFound, Unavailable, and what the store refuses it for."""
        task = self._bringing.get(version)
        if task is None:
            task = asyncio.create_task(self._bring(version), name=f"bring {version}")
            self._bringing[version] = task
            task.add_done_callback(lambda _: self._bringing.pop(version, None))
        await asyncio.shield(task)

    async def _follow(self, pointer: str) -> None:
        pause = FIRST_PAUSE_S
        while True:
            try:
                await self._site.adopt_keys(await self._home.keys())
                have = await self._site.versions() if pointer == HEAD else None
                async with self._home.watch(pointer, have) as responses:
                    async for response in responses:
                        pause = FIRST_PAUSE_S
                        self._on_link(True)
                        await self._take(response)
            except LongshoreError as error:
                self._on_link(not isinstance(error, Unavailable))
                log.info("mirroring broke off", pointer=pointer, reason=str(error))
            finally:
                if pointer == HEAD:
                    await self._leave()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _take(self, response: weights_pb2.WatchResponse) -> None:
        if response.push_broken:
            await self._end(Unavailable("home did not publish what it had sent"))
        elif self._inflow is not None and self._inflow.whole:
            # Home says nothing more of a version that it has published; what comes next proves it.
            self._inflow.confirm()
        if response.HasField("push"):
            await self._begin(response.push)
        if response.chunk and self._inflow is not None:
            await self._inflow.add(response.chunk)
        if response.HasField("pointer"):
            await self._point(response.pointer)

    async def _begin(self, push: weights_pb2.VersionPush) -> None:
        await self._settle()
        if len(push.path) != 1:
            # A path of several encodings is decoded here; its bytes are asked for when the pointer has come.
            return
        encoding = push.path[0].encoding
        header = weights_pb2.PublishHeader(manifest=push.manifest, encoding=encoding)
        missing = await self._site.lacks_assets(push.manifest)
        if missing is not None:
            header.assets = await self._home.assets(missing)
        self._inflow = Inflow(encoding.sha256, encoding.size)
        self._taking = asyncio.create_task(self._site.take(header, self._inflow), name="take")

    async def _point(self, signed: weights_pb2.SignedPointer) -> None:
        await self._settle()
        pointer = weights_pb2.Pointer.FromString(signed.pointer)
        if pointer.version not in await self._site.versions():
            await self.bring(pointer.version)
        await self._site.point(signed)

    async def _settle(self) -> None:
        """Waits for the version that came last; one that could not be taken over is left to `bring`."""
        taking, self._taking, self._inflow = self._taking, None, None
        if taking is None:
            return
        try:
            await taking
        except LongshoreError as error:
            self._on_fault()
            log.warning("a version could not be taken over as it came", reason=str(error))

    async def _end(self, reason: LongshoreError) -> None:
        if self._inflow is not None:
            self._inflow.fail(reason)
        await self._settle()

    async def _leave(self) -> None:
        """The stream has ended: what was on its way is finished by asking for the rest of its bytes."""
        inflow = self._inflow
        if inflow is None:
            return
        try:
            async with asyncio.timeout(BRING_S):
                await self._finish(inflow)
        except (LongshoreError, TimeoutError) as error:
            inflow.fail(Unavailable(f"the rest of a version did not come: {error}"))
        await self._settle()

    async def _finish(self, inflow: Inflow) -> None:
        """Raises NotFound: home does not have it, because it was never published."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                async for chunk in self._home.fetch(inflow.sha256, inflow.received):
                    await inflow.add(chunk)
                # Home stores bytes for the versions that it publishes.
                inflow.confirm()
                return
            except Unavailable:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _bring(self, version: int) -> None:
        async with asyncio.timeout(BRING_S):
            response = await self._home.version(version, await self._site.versions())
            if not response.path:
                raise NotFound(f"home has no way to version {version}")
            missing = await self._site.lacks_assets(response.manifest)
            assets = b"" if missing is None else await self._home.assets(missing)
            if len(response.path) == 1:
                encoding = response.path[0].encoding
                inflow = Inflow(encoding.sha256, encoding.size)
                header = weights_pb2.PublishHeader(manifest=response.manifest, encoding=encoding, assets=assets)
                taking = asyncio.create_task(self._site.take(header, inflow))
                try:
                    await self._finish(inflow)
                except BaseException as error:
                    inflow.fail(error if isinstance(error, LongshoreError) else Unavailable("given up"))
                    raise
                finally:
                    await asyncio.gather(taking, return_exceptions=True)
                taking.result()
                return
            payloads = [await self._whole(step.encoding) for step in response.path]
            await self._site.rebuild(response, payloads, assets)

    async def _whole(self, encoding: weights_pb2.Encoding) -> bytes:
        inflow = Inflow(encoding.sha256, encoding.size, buffered=None)
        await self._finish(inflow)
        return b"".join([chunk async for chunk in inflow.chunks()])
