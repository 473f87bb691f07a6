"""The routes about what a job has learned: policy versions, the served one, checkpoints, the signing key."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic
import structlog
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import ConfigDict, Field
from starlette.types import Receive, Scope, Send

from longshore.api_types import CheckpointList, CheckpointView, FileView, KeyId, PointerView, VersionPage, WholeVersion
from longshore.gateway import checkpoints
from longshore.gateway.auth import SteeredJob, ViewedJob
from longshore.gateway.body import read_model
from longshore.gateway.checkpoints import Checkpoint
from longshore.gateway.responses import READS, STEERS, TAKES
from longshore.gateway.store import Job
from longshore.gateway.streams import iso_time
from longshore.gateway.versions import Export, Versions
from longshore.weight_store.payload import encode_header
from longshore.weights.client import PointerState

log = structlog.get_logger()

MAX_VERSIONS = 1000
_MAX_VERSION = 2**63 - 1
_BLOCK = 1024 * 1024
# A download may take so long, and a second more for each so many bytes.
_PATIENCE_S, _SLOWEST = 60.0, 256 * 1024
Number = Annotated[int, InPath(ge=0, le=_MAX_VERSION)]
# Makes a job's next signing key and hands over to it; returns the key's id.
Rotate = Callable[[Job], Awaitable[str]]


class RollbackBody(pydantic.BaseModel):
    """Example: {"version": 40}"""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=0, le=_MAX_VERSION, description="policy version that is to be served")


class VersionRoutes:
    """The routes over one weight store and the jobs' folders."""

    def __init__(self, versions: Versions, rotate: Rotate, runs_dir: Path) -> None:
        self._versions = versions
        self._rotate = rotate
        self._runs_dir = runs_dir

    def add_to(self, router: APIRouter) -> None:
        """Adds every route, below /jobs/{job_id}."""
        job, version = "/jobs/{job_id}", "/jobs/{job_id}/versions/{version}"
        checkpoint = "/jobs/{job_id}/checkpoints/{name}"
        reads: dict[str, Any] = {"methods": ["GET"], "tags": ["versions"], "responses": READS}
        steers: dict[str, Any] = {"tags": ["versions"], "responses": STEERS}
        body = {"requestBody": {"required": True, "content": {"application/json": {"schema": _ROLLBACK_SCHEMA}}}}
        takes: dict[str, Any] = {"methods": ["POST"], "tags": ["versions"], "responses": TAKES, "openapi_extra": body}
        bytes_of: dict[str, Any] = {**reads, "responses": {**READS, 200: _BYTES}, "response_class": Response}
        gone: dict[str, Any] = {**steers, "methods": ["DELETE"], "status_code": 204, "response_class": Response}
        add = router.add_api_route
        add(job + "/rollback", self.rollback, operation_id="rollback", **takes)
        add(job + "/keys/rotate", self.rotate_key, operation_id="rotate_key", methods=["POST"], **steers)
        add(job + "/versions", self.list, operation_id="versions", **reads)
        add(version, self.version, operation_id="version", **reads)
        add(version + "/model", self.model, operation_id="model", **bytes_of)
        add(version + "/pin", self.pin, operation_id="pin_version", methods=["PUT"], **steers)
        add(version + "/pin", self.unpin, operation_id="unpin_version", **gone)
        add(job + "/checkpoints", self.checkpoints, operation_id="checkpoints", **reads)
        add(checkpoint + "/files/{file}", self.file, operation_id="checkpoint_file", **bytes_of)
        add(checkpoint + "/pin", self.pin_checkpoint, operation_id="pin_checkpoint", methods=["PUT"], **steers)
        add(checkpoint + "/pin", self.unpin_checkpoint, operation_id="unpin_checkpoint", **gone)

    async def rollback(self, job: SteeredJob, request: Request) -> PointerView:
        """Moves the signed pointer `serving` to a version, back or forth; generators that follow it serve that."""
        body = await read_model(request, RollbackBody)
        moved = await self._versions.serve(job, body.version)
        log.info("serving moved", job=job.id, version=body.version)
        return _pointer(moved)

    async def rotate_key(self, job: SteeredJob) -> KeyId:
        """Has the job's policy versions signed by a new key. 409: it was never started."""
        key_id = await self._rotate(job)
        log.info("key rotated", job=job.id, key_id=key_id)
        return {"key_id": key_id}

    async def list(
        self,
        job: ViewedJob,
        limit: Annotated[int, Query(ge=1, le=MAX_VERSIONS)] = 100,
        before: Annotated[int | None, Query(ge=0, le=_MAX_VERSION, description="`next` of the page before")] = None,
    ) -> VersionPage:
        """Policy versions on hand, newest first, and the names that point to each."""
        found = await self._versions.page(job, limit, before)
        following = found[-1][0] if len(found) == limit and found[-1][0] > 0 else None
        return {"versions": [{"version": number, "names": names} for number, names in found], "next": following}

    async def version(self, job: ViewedJob, version: Number) -> WholeVersion:
        """What the version's signed manifest says."""
        found, names = await self._versions.describe(job, version)
        return {
            "version": found.version,
            "names": names,
            "train_step": found.train_step,
            "learner_epoch": found.learner_epoch,
            "checksum": found.checksum,
            "assets_sha256": found.assets_sha256,
            "layout_sha256": found.layout_sha256,
        }

    async def model(self, job: ViewedJob, version: Number) -> StreamingResponse:
        """The version's tensors as one safetensors file, each checked against the signed manifest."""
        async with contextlib.AsyncExitStack() as held:
            export = await held.enter_async_context(self._versions.export(job, version))
            return _Download(export, f"{job.id}-v{version}.safetensors", held.pop_all())

    async def pin(self, job: SteeredJob, version: Number) -> PointerView:
        """Has the version kept, however many newer ones there are."""
        return _pointer(await self._versions.pin(job, version))

    async def unpin(self, job: SteeredJob, version: Number) -> Response:
        """Takes the version's pin away."""
        await self._versions.unpin(job, version)
        return Response(status_code=204)

    async def checkpoints(self, job: ViewedJob) -> CheckpointList:
        """The learner's durable checkpoints, newest first, and `final`, the trained model."""
        found = await asyncio.to_thread(checkpoints.list_checkpoints, self._runs_dir / job.id)
        return {"checkpoints": [_checkpoint(item) for item in found]}

    async def file(self, job: ViewedJob, name: str, file: str) -> FileResponse:
        """One file of a checkpoint; ranges are answered, so that a broken download goes on."""
        path = await asyncio.to_thread(checkpoints.checkpoint_file, self._runs_dir / job.id, name, file)
        return FileResponse(path, media_type="application/octet-stream", filename=file)

    async def pin_checkpoint(self, job: SteeredJob, name: str) -> CheckpointView:
        """Has the checkpoint kept when the learner removes older ones. 409: the final model stays anyway."""
        return _checkpoint(await asyncio.to_thread(checkpoints.pin, self._runs_dir / job.id, name))

    async def unpin_checkpoint(self, job: SteeredJob, name: str) -> Response:
        """Takes the checkpoint's pin away."""
        await asyncio.to_thread(checkpoints.unpin, self._runs_dir / job.id, name)
        return Response(status_code=204)


class _Download(StreamingResponse):
    """A version on its way to whoever asked; until it is there, or they have gone, its memory is taken."""

    def __init__(self, export: Export, name: str, held: contextlib.AsyncExitStack) -> None:
        size = sum(len(part) for part in _parts(export))
        headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{name}"'}
        super().__init__(_blocks(export), media_type="application/octet-stream", headers=headers)
        self._held = held
        self._deadline_s = _PATIENCE_S + size / _SLOWEST

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            try:
                async with asyncio.timeout(self._deadline_s):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                # Without the rest the server ends the connection, and the caller sees that it has not got all.
                log.warning("download ended", path=scope["path"], after_s=round(self._deadline_s))


def _pointer(state: PointerState) -> PointerView:
    return {
        "name": state.name,
        "version": state.version,
        "serial": state.serial,
        "expires_at": iso_time(state.expires_at),
    }


def _checkpoint(item: Checkpoint) -> CheckpointView:
    files: list[FileView] = [{"name": file.name, "bytes": file.size, "sha256": file.sha256} for file in item.files]
    return {"name": item.name, "step": item.step, "pinned": item.pinned, "files": files}


def _parts(export: Export) -> list[bytes]:
    assert export.version.tensors is not None
    return [encode_header(export.version.tensors), *(tensor.data for tensor in export.version.tensors)]


def _blocks(export: Export) -> Iterator[memoryview]:
    for part in _parts(export):
        view = memoryview(part)
        for start in range(0, len(view), _BLOCK):
            yield view[start : start + _BLOCK]


_ROLLBACK_SCHEMA = RollbackBody.model_json_schema()
_BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
