"""Follows a pointer of the weight store: fetch, stage, swap; always to the newest version, skipping others.

The engine proves each version by its canaries. A version's bytes may come before the pointer says that it is published:
then it is staged ahead (and proven, where the engine can), and the pointer brings the swap alone. Whatever fails leaves
the old version serving, is counted, and is tried again with growing pauses until it works or the pointer moves on.
Knows neither the wire nor what kind of engine it feeds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Protocol

import structlog

from longshore.errors import ConfigError, IntegrityError, LongshoreError, Unavailable
from longshore.generator import metrics
from longshore.generator.canary import Proof
from longshore.generator.engine import Engine
from longshore.generator.llama_weights import TorchViews
from longshore.types import JobRef
from longshore.weights.client import News, PolicyVersion

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0

log = structlog.get_logger()


class VersionSource(Protocol):
    """What a follower needs of weights.client.WeightsClient."""

    def watch(self, pointer: str) -> AsyncIterator[News]: ...

    async def fetch(self, version: int) -> PolicyVersion: ...

    async def describe(self, version: int) -> PolicyVersion:
        """As published, without its tensors. Raises NotFound: it was not, or not yet."""

    async def assets(self, sha256: str) -> dict[str, bytes]: ...


# Makes an engine of a model's config.json; raises ConfigError when it cannot run such a model.
MakeEngine = Callable[[bytes], Engine]
# Told after each swap, with the engine that now serves the version.
OnVersion = Callable[[Engine], Awaitable[None]]


class Follower:
    """Keeps one engine at a pointer's version; makes the engine when the first version tells what model it is."""

    def __init__(
        self, source: VersionSource, make_engine: MakeEngine, on_version: OnVersion, job: JobRef, pointer: str = "head"
    ) -> None:
        self._source = source
        self._pointer = pointer
        self._make_engine = make_engine
        self._on_version = on_version
        self._labels = (job.project, job.job)
        self._engine: Engine | None = None
        # The files that came with the weights, as the newest version that was staged names them.
        self.assets: dict[str, bytes] = {}
        self._assets_sha256 = ""
        self._config = b""
        self._views = TorchViews()
        # What the pointer names; None until it is known.
        self._head: int | None = None
        # The newest version whose bytes came before its pointer.
        self._ahead: int | None = None
        self._moved = asyncio.Event()
        # Staging is for one version at a time.
        self._staging = asyncio.Lock()
        # Versions that are being made resident beside the served one.
        self._keeping: dict[int, asyncio.Task[None]] = {}
        # Version and checksum of what is staged.
        self._staged: tuple[int, str] | None = None
        self._resident: int | None = None

    async def run(self) -> None:
        """Follows until cancelled, or until the source ends.

        Raises:
            ConfigError: the job's model is none that the engine can run.
        """
        following = asyncio.create_task(self._follow())
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait((following, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (following, watching, *self._keeping.values()):
                task.cancel()
            ended = await asyncio.gather(following, watching, return_exceptions=True)
        for result in ended:
            if isinstance(result, Exception):
                raise result

    async def keep(self, version: int) -> None:
        """Makes another version resident beside the served one, for requests that ask for it.

        Raises:
            NotFound: there is no such version, or it is not published yet.
            Unavailable: nothing is served yet, or there is no room.
            IntegrityError: the version cannot be proven.
        """
        if self._engine is None:
            raise Unavailable("no policy version has been proven yet")
        task = self._keeping.get(version)
        if task is None:
            task = asyncio.create_task(self._keep(self._engine, version), name=f"keep {version}")
            self._keeping[version] = task
            task.add_done_callback(partial(self._kept, version))
        # Staging goes on in its thread when who asked has gone: nothing else may be staged before it ends.
        await asyncio.shield(task)

    async def _keep(self, engine: Engine, version: int) -> None:
        async with self._staging:
            status = engine.status()
            if version in (status.version, *status.beside):
                return
            if engine.limits.residents < 2:
                raise Unavailable(f"no room for version {version}: this generator holds one version at a time")
            # What was pushed may be withdrawn; its number then comes with other weights.
            published = await self._source.describe(version)
            await self._prepare(version)
            staged, self._staged = self._staged, None
            if staged != (version, published.checksum):
                raise Unavailable(f"what came as version {version} is not what was published as it")
            await asyncio.wrap_future(engine.keep())

    def _kept(self, version: int, task: asyncio.Task[None]) -> None:
        del self._keeping[version]
        if not task.cancelled():
            # Whoever still waits is told; without one, nobody needs to be.
            task.exception()

    async def _watch(self) -> None:
        async for news in self._source.watch(self._pointer):
            if news.published:
                self._head = news.version
            else:
                self._ahead = news.version
            self._moved.set()

    async def _follow(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            await self._moved.wait()
            self._moved.clear()
            pause = FIRST_PAUSE_S
            await self._get_ahead()
            while self._head is not None and self._head != self._resident:
                if await self._try(self._head):
                    continue
                try:
                    # A newer version is tried at once.
                    await asyncio.wait_for(self._moved.wait(), pause)
                except TimeoutError:
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                else:
                    break

    async def _get_ahead(self) -> None:
        """Stages a version that is not published yet. If that fails, the pointer will have it tried again."""
        version, self._ahead = self._ahead, None
        if version is None or self._engine is None or version in (self._resident, self._head):
            return
        try:
            async with self._staging:
                await self._prepare(version)
        except LongshoreError as error:
            log.info("not staged ahead", version=version, reason=str(error))

    async def _try(self, version: int) -> bool:
        started = time.monotonic()
        try:
            await self._go_to(version)
        except LongshoreError as error:
            if self._engine is None and isinstance(error, ConfigError):
                raise
            metrics.REFUSED.labels(*self._labels, type(error).__name__).inc()
            log.warning("version refused", version=version, serving=self._resident, reason=str(error))
            return False
        seconds = time.monotonic() - started
        metrics.SWAP_SECONDS.labels(*self._labels).observe(seconds)
        log.info("version serves", version=version, seconds=round(seconds, 3))
        return True

    async def _go_to(self, version: int) -> None:
        async with self._staging:
            engine = await self._prepare(version)
            self._staged = None
            swapped = engine.swap()
        await asyncio.wrap_future(swapped)
        self._resident = version
        await self._on_version(engine)

    async def _prepare(self, version: int) -> Engine:
        """Fetches a version and stages it; once, where nothing came between."""
        policy = await self._source.fetch(version)
        engine = await self._engine_for(policy.assets_sha256)
        # The checksum too: what came ahead and was then not published may have left its number to other weights.
        if self._staged != (version, policy.checksum):
            self._staged = None
            await asyncio.to_thread(_stage, engine, policy, self._views)
            self._staged = (version, policy.checksum)
        return engine

    async def _engine_for(self, assets_sha256: str) -> Engine:
        """The engine of the model that an asset bundle describes; there is one model to a job."""
        if self._engine is not None and assets_sha256 == self._assets_sha256:
            return self._engine
        assets = await self._source.assets(assets_sha256)
        config = assets.get("config.json")
        if config is None:
            raise IntegrityError("the version's assets hold no config.json")
        if self._engine is None:
            self._engine = await asyncio.to_thread(self._make_engine, config)
            self._config = config
        elif config != self._config:
            raise IntegrityError("the version is of another model than the one that is served")
        self._assets_sha256, self.assets = assets_sha256, assets
        return self._engine


def _stage(engine: Engine, policy: PolicyVersion, views: TorchViews) -> None:
    assert policy.tensors is not None
    engine.stage(policy.version, views.of(policy.tensors), Proof(policy.canaries))
