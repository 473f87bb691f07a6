"""The routes about jobs: submit, list, look, steer, follow. Decides nothing itself."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import ConfigDict, Field

from longshore.api_types import JobPage, JobView, Json, ParentView
from longshore.config import JobSpec
from longshore.errors import NotFound
from longshore.gateway.auth import SteeredJob, Submitter, ViewedJob, Viewer
from longshore.gateway.body import read_document, read_model
from longshore.gateway.forks import Forks
from longshore.gateway.job_logs import LogReader, labelled, log_files
from longshore.gateway.jobs import Jobs, Submission
from longshore.gateway.pages import cursor_of, read_cursor
from longshore.gateway.principal import Principal
from longshore.gateway.responses import READS, STEERS, TAKES, Responses
from longshore.gateway.states import JobState
from longshore.gateway.store import Job
from longshore.gateway.streams import event_stream, iso_time, log_stream

MAX_TAIL = 10_000
MAX_PAGE = 1000
IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[\x21-\x7e]{1,128}$",
        description=(
            "Requests with one key make one job, also when they come at the same time; another request with it: 409"
        ),
    ),
]


class ForkBody(pydantic.BaseModel):
    """Example: {"version": 40, "changes": {"train": {"learning_rate": 1e-4}}}"""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int | None = Field(None, ge=0, lt=2**63, description="policy version; absent: the newest")
    changes: dict[str, Any] = Field(
        default_factory=dict, description="laid over the parent's spec (RFC 7396): null takes a setting away"
    )


class JobRoutes:
    """The routes over one `Jobs`."""

    def __init__(self, jobs: Jobs, forks: Forks, runs_dir: Path, stop: asyncio.Event) -> None:
        self._jobs = jobs
        self._store = jobs.store
        self._forks = forks
        self._runs_dir = runs_dir
        self._stop = stop

    def add_to(self, router: APIRouter) -> None:
        """Adds every route."""
        spec: Json = {"requestBody": {"required": True, "content": dict.fromkeys(_DOCUMENT_TYPES, _JOB_SCHEMA)}}
        fork = {"requestBody": {"content": {"application/json": {"schema": ForkBody.model_json_schema()}}}}
        made: dict[str, Any] = {"methods": ["POST"], "status_code": 201, "tags": ["jobs"], "responses": TAKES}
        reads: dict[str, Any] = {"methods": ["GET"], "tags": ["jobs"], "responses": READS}
        steers: dict[str, Any] = {"methods": ["POST"], "tags": ["jobs"], "responses": STEERS}
        job = "/jobs/{job_id}"
        add = router.add_api_route
        add("/jobs", self.submit, operation_id="submit", openapi_extra=spec, **made)
        add("/jobs", self.list, operation_id="jobs", **reads)
        unchanged: Responses = {304: {"description": "It is as If-None-Match says"}}
        add(job, self.get, operation_id="job", response_model=JobView, **{**reads, "responses": {**READS, **unchanged}})
        for act in (self.cancel, self.pause, self.resume):
            add(f"{job}/{act.__name__}", act, operation_id=act.__name__, **steers)
        add(f"{job}/fork", self.fork, operation_id="fork", openapi_extra=fork, **made)
        stream: Responses = {200: {"content": {"text/event-stream": {"schema": _EVENT_SCHEMA}}}}
        add(
            f"{job}/events",
            self.events,
            operation_id="events",
            response_class=StreamingResponse,
            **{**reads, "responses": {**READS, **stream}},
        )
        add(
            f"{job}/logs",
            self.logs,
            operation_id="logs",
            response_class=PlainTextResponse,
            response_model=None,
            **reads,
        )
        add(f"{job}/summary", self.summary, operation_id="summary", response_model=Json, **reads)

    async def submit(self, request: Request, caller: Submitter, idempotency_key: IdempotencyKey = None) -> JobView:
        """Queues a job. 422 lists every fault of its spec."""
        sent = _submission(request, caller, idempotency_key)
        return self._view(await self._jobs.submit(await read_document(request), sent))

    async def list(
        self,
        caller: Viewer,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
        cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before")] = None,
        state: JobState | None = None,
    ) -> JobPage:
        """The jobs of the caller's project, newest first."""
        found = await self._store.newest(limit + 1, caller.project, state, read_cursor(cursor))
        page = found[:limit]
        more = len(found) > limit
        return {
            "jobs": [self._view(job) for job in page],
            "next": cursor_of(page[-1].created_at, page[-1].id) if more else None,
        }

    async def get(
        self,
        job: ViewedJob,
        response: Response,
        if_none_match: Annotated[str | None, Header(description="the ETag of an answer that the caller has")] = None,
    ) -> JobView | Response:
        """One job with its spec."""
        tag = f'"{job.revision}"'
        if if_none_match is not None and tag in [item.strip() for item in if_none_match.split(",")]:
            return Response(status_code=304, headers={"ETag": tag})
        response.headers["ETag"] = tag
        return self._view(job)

    async def cancel(self, job: SteeredJob) -> JobView:
        """Asks for the job's end. 409 once it has succeeded or failed."""
        return self._view(await self._jobs.cancel(job))

    async def pause(self, job: SteeredJob) -> JobView:
        """Has the job's processes stopped after a checkpoint; its place is another's. 409 once it has ended."""
        return self._view(await self._jobs.pause(job))

    async def resume(self, job: SteeredJob) -> JobView:
        """Has a paused job wait for a place again; it goes on from its newest checkpoint. 409: it is not paused."""
        return self._view(await self._jobs.resume(job))

    async def fork(
        self, job: SteeredJob, request: Request, caller: Submitter, idempotency_key: IdempotencyKey = None
    ) -> JobView:
        """Queues a new job that begins with a policy version of this one, with changed settings."""
        body = await read_model(request, ForkBody)
        sent = Submission(
            caller,
            request.is_disconnected,
            idempotency_key,
            request=("fork", job.id, body.version, body.changes),
        )
        return self._view(await self._forks.fork(job, body.version, body.changes, sent))

    async def events(
        self, job: ViewedJob, last_event_id: Annotated[str, Header(pattern=r"^\d{1,18}$")] = "0"
    ) -> StreamingResponse:
        """The job's events (server-sent events) after Last-Event-ID; ends with its terminal state."""
        stream = event_stream(self._store, job.id, int(last_event_id), self._stop)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def logs(
        self,
        job: ViewedJob,
        service: Annotated[str | None, Query(max_length=100)] = None,
        tail: Annotated[int, Query(ge=0, le=MAX_TAIL)] = 200,
        follow: bool = False,
    ) -> PlainTextResponse | StreamingResponse:
        """The last lines of the job's logs; with `follow`, also those to come until the job has ended."""
        folder = self._runs_dir / job.id / "logs"
        files = await asyncio.to_thread(log_files, folder, service)
        if follow:
            stream = log_stream(self._store, job.id, folder, service, tail, self._stop)
            return StreamingResponse(stream, media_type="text/plain; charset=utf-8")
        return PlainTextResponse(await asyncio.to_thread(_last_lines, files, tail))

    async def summary(self, job: ViewedJob) -> JSONResponse:
        """What the job's summary.json holds. 404 until it has ended in order."""
        try:
            text = await asyncio.to_thread((self._runs_dir / job.id / "summary.json").read_text, "utf-8")
        except FileNotFoundError:
            raise NotFound(f"job {job.id} has no summary yet") from None
        return JSONResponse(json.loads(text))

    def _view(self, job: Job) -> JobView:
        parent: ParentView | None = None
        if job.parent_job is not None and job.parent_version is not None:
            parent = {"job": job.parent_job, "version": job.parent_version}
        return {
            "id": job.id,
            "project": job.project,
            "name": job.name,
            "state": job.state.value,
            "error": job.error,
            "created_at": iso_time(job.created_at),
            "updated_at": iso_time(job.updated_at),
            "progress": job.progress,
            "run_dir": str(self._runs_dir / job.id),
            "revision": job.revision,
            "parent": parent,
            "spec": job.spec,
        }


def _last_lines(files: dict[str, Path], tail: int) -> str:
    return "".join(labelled(name, LogReader(path, tail).read(), len(files) == 1) for name, path in files.items())


def _submission(request: Request, caller: Principal, idempotency_key: str | None) -> Submission:
    return Submission(caller, request.is_disconnected, idempotency_key)


# Of one event: `data` is JSON with `type`, `time` and what docs/architecture.md says of the type.
_EVENT_SCHEMA = {
    "type": "object",
    "required": ["id", "event", "data"],
    "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": {"type": "string"}},
}
_DOCUMENT_TYPES = ("application/json", "application/yaml")
# Local references would point outside the request's schema: the parts are written in place of a name.
_JOB_SCHEMA = {"schema": JobSpec.model_json_schema() | {"$id": "urn:longshore:job-spec"}}
