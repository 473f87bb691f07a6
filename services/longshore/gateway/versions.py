"""A job's policy versions at the weight store: what there is, which names point where, and moving the names.

What is signed here is signed with the job's own key, which the gateway keeps for its learner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from longshore.errors import Conflict, NotFound, Unavailable
from longshore.gateway.store import Job
from longshore.launcher.plan import JobPaths
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.weights.client import PointerState, PolicyVersion, WeightsClient

SERVING = "serving"
_PIN = "pin/"
_DAY_S = 86_400.0
# `serving` and pins last until they are moved or taken away; a pointer has to end at some time.
_KEEP_S = 3650 * _DAY_S
# The store takes no pointer that has expired: one that is taken away is moved to this near an end.
_TAKE_AWAY_S = 2.0
# Whole models are in memory while they are fetched, and until whoever asked has read them.
_MAX_EXPORTS = 2
_TURN_S = 60.0
_FETCH_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Export:
    """A version as a Hugging Face checkpoint would hold it."""

    version: PolicyVersion
    # File name -> content: config and tokenizer.
    assets: dict[str, bytes]


class Versions:
    """The versions of all jobs. Methods raise NotFound (no such version; the job was never started), and Unavailable
    while the weight store is away."""

    def __init__(self, address: str, paths_of: Callable[[str], JobPaths]) -> None:
        self._address = address
        self._paths_of = paths_of
        self._exports = asyncio.Semaphore(_MAX_EXPORTS)

    async def page(self, job: Job, limit: int, before: int | None) -> list[tuple[int, list[str]]]:
        """(version, the names that point to it), newest first."""
        async with self._client(job) as client:
            numbers = await client.versions(limit, before=before)
            names = _names(await client.pointers())
        return [(number, names.get(number, [])) for number in numbers]

    async def describe(self, job: Job, version: int) -> tuple[PolicyVersion, list[str]]:
        """A version's manifest, verified, and the names that point to it."""
        async with self._client(job) as client:
            described = await client.describe(version)
            return described, _names(await client.pointers()).get(version, [])

    @contextlib.asynccontextmanager
    async def export(self, job: Job, version: int | None) -> AsyncIterator[Export]:
        """A version whole for the block, every tensor verified; None: the one that head names. Raises Unavailable also
        while as many as there is memory for are with others."""
        try:
            async with asyncio.timeout(_TURN_S):
                await self._exports.acquire()
        except TimeoutError:
            raise Unavailable("others are being sent the versions that there is memory for; try again later") from None
        try:
            async with self._client(job) as client:
                number = await client.head() if version is None else version
                fetched = await client.fetch(number, _FETCH_TIMEOUT_S)
                export = Export(fetched, await client.assets(fetched.assets_sha256))
            yield export
        finally:
            self._exports.release()

    async def serve(self, job: Job, version: int) -> PointerState:
        """Moves `serving` to a version, forth or back. Raises Conflict: somebody else moved it just now."""
        return await self._point(job, SERVING, version, _KEEP_S)

    async def pin(self, job: Job, version: int) -> PointerState:
        """Has a version kept, however many newer ones there are."""
        return await self._point(job, f"{_PIN}v{version}", version, _KEEP_S)

    async def unpin(self, job: Job, version: int) -> None:
        """Takes a pin away, within seconds. Raises NotFound: there is none."""
        async with self._client(job) as client:
            if f"{_PIN}v{version}" not in _names(await client.pointers()).get(version, []):
                raise NotFound(f"version {version} of {job.id} is not pinned")
        await self._point(job, f"{_PIN}v{version}", version, _TAKE_AWAY_S)

    async def _point(self, job: Job, name: str, version: int, keep_s: float) -> PointerState:
        key_file = self._paths_of(job.id).signing_key_file
        if not await asyncio.to_thread(key_file.exists):
            raise Conflict(f"job {job.id} has not been started: it has no key to sign with")
        key = await asyncio.to_thread(SigningKey.load, key_file)
        async with self._client(job) as client:
            return await client.point(key, name, version, keep_s)

    @contextlib.asynccontextmanager
    async def _client(self, job: Job) -> AsyncIterator[WeightsClient]:
        file = await asyncio.to_thread(_job_file, self._paths_of(job.id).job_file)
        if file is None:
            raise NotFound(f"job {job.id} has not been started: it has no versions")
        client = WeightsClient(self._address, file.ref, bytes.fromhex(file.learner_public_key))
        try:
            yield client
        finally:
            await client.close()


def _job_file(path: Path) -> JobFile | None:
    try:
        return JobFile.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _names(pointers: list[PointerState]) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for pointer in sorted(pointers, key=lambda pointer: pointer.name):
        names.setdefault(pointer.version, []).append(pointer.name)
    return names
