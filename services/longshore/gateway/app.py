"""The REST API: routes, who may call them, and what they answer. Decides nothing about jobs itself."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Annotated

import pydantic
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import longshore
from longshore.config import JobSpec
from longshore.errors import NotFound
from longshore.gateway import metrics, problems
from longshore.gateway.body import read_document
from longshore.gateway.books import Books
from longshore.gateway.job_logs import LogReader, labelled, log_files
from longshore.gateway.jobs import Jobs
from longshore.gateway.store import Job
from longshore.gateway.streams import event_stream, iso_time, log_stream
from longshore.gateway.ticket_routes import TicketRoutes

MAX_TAIL = 10_000


class JobView(pydantic.BaseModel):
    """A job as the API shows it."""

    id: str
    project: str
    name: str
    state: str
    error: str
    created_at: str
    updated_at: str
    progress: dict[str, object]
    run_dir: str
    spec: dict[str, object] | None = None


class KeyView(pydantic.BaseModel):
    """The key that signs a job's versions from now on: the first 16 hex digits of its public half's SHA-256."""

    key_id: str


class JobList(pydantic.BaseModel):
    """Jobs, newest first, without their specs."""

    jobs: list[JobView]


class Api:
    """The routes over one `Jobs`."""

    def __init__(self, jobs: Jobs, books: Books, runs_dir: Path, api_key: str, stop: asyncio.Event) -> None:
        self._jobs = jobs
        self._runs_dir = runs_dir
        self._key_digest = hashlib.sha256(api_key.encode()).digest()
        self._stop = stop
        self._tickets = TicketRoutes(jobs.store, books)

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(title="Longshore", version=longshore.__version__, docs_url=None, redoc_url=None)
        problems.install(app)
        app.add_api_route("/healthz", self.health, methods=["GET"], summary="Whether the gateway serves")
        app.include_router(self._router())
        app.add_middleware(_Edge, stop=self._stop)
        return app

    def _router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", dependencies=[Depends(self.authorize)], responses=_PROBLEMS)
        body = {"requestBody": {"required": True, "content": dict.fromkeys(_DOCUMENT_TYPES, _JOB_SCHEMA)}}
        router.add_api_route("/jobs", self.submit, methods=["POST"], status_code=201, openapi_extra=body)
        router.add_api_route("/jobs", self.list_jobs, methods=["GET"])
        router.add_api_route("/jobs/{job_id}", self.job, methods=["GET"])
        router.add_api_route("/jobs/{job_id}/cancel", self.cancel, methods=["POST"])
        router.add_api_route("/jobs/{job_id}/keys/rotate", self.rotate_key, methods=["POST"])
        router.add_api_route("/jobs/{job_id}/events", self.events, methods=["GET"], response_class=StreamingResponse)
        router.add_api_route(
            "/jobs/{job_id}/logs", self.logs, methods=["GET"], response_class=PlainTextResponse, response_model=None
        )
        router.add_api_route("/jobs/{job_id}/summary", self.summary, methods=["GET"])
        self._tickets.add_to(router)
        return router

    async def authorize(self, authorization: Annotated[str, Header()] = "") -> None:
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # Digests have one length, so the comparison tells nothing of the key's.
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self._key_digest):
            raise problems.Problem(401, "send Authorization: Bearer <API key>", {"WWW-Authenticate": "Bearer"})

    async def health(self) -> dict[str, str]:
        return {"status": "serving", "version": longshore.__version__}

    async def submit(self, request: Request) -> JobView:
        """Queues a job. 422 lists every fault of its spec."""
        return self._view(await self._jobs.submit(await read_document(request), request.is_disconnected))

    async def list_jobs(self, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> JobList:
        """The newest jobs, newest first."""
        found = await self._jobs.store.newest(limit)
        return JobList(jobs=[self._view(job, with_spec=False) for job in found])

    async def job(self, job_id: str) -> JobView:
        return self._view(await self._jobs.store.get(job_id))

    async def cancel(self, job_id: str) -> JobView:
        """Asks for the job's end. 409 once it has succeeded or failed."""
        return self._view(await self._jobs.cancel(job_id))

    async def rotate_key(self, job_id: str) -> KeyView:
        """Has the job's policy versions signed by a new key. 409: it was never started."""
        return KeyView(key_id=await self._jobs.rotate_key(job_id))

    async def events(
        self, job_id: str, last_event_id: Annotated[str, Header(pattern=r"^\d{1,18}$")] = "0"
    ) -> StreamingResponse:
        """The job's events (text/event-stream) after Last-Event-ID; ends with its terminal state."""
        await self._jobs.store.get(job_id)
        stream = event_stream(self._jobs.store, job_id, int(last_event_id), self._stop)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def logs(
        self,
        job_id: str,
        service: str | None = None,
        tail: Annotated[int, Query(ge=0, le=MAX_TAIL)] = 200,
        follow: bool = False,
    ) -> PlainTextResponse | StreamingResponse:
        """The last lines of the job's logs; with `follow`, also those to come until the job has ended."""
        await self._jobs.store.get(job_id)
        folder = self._runs_dir / job_id / "logs"
        files = await asyncio.to_thread(log_files, folder, service)
        if follow:
            stream = log_stream(self._jobs.store, job_id, folder, service, tail, self._stop)
            return StreamingResponse(stream, media_type="text/plain; charset=utf-8")
        text = [labelled(name, LogReader(path, tail).read(), len(files) == 1) for name, path in files.items()]
        return PlainTextResponse("".join(text))

    async def summary(self, job_id: str) -> JSONResponse:
        """What the job's summary.json holds. 404 until it has ended in order."""
        await self._jobs.store.get(job_id)
        try:
            text = await asyncio.to_thread((self._runs_dir / job_id / "summary.json").read_text, "utf-8")
        except FileNotFoundError:
            raise NotFound(f"job {job_id} has no summary yet") from None
        return JSONResponse(json.loads(text))

    def _view(self, job: Job, with_spec: bool = True) -> JobView:
        return JobView(
            id=job.id,
            project=job.project,
            name=job.name,
            state=job.state.value,
            error=job.error,
            created_at=iso_time(job.created_at),
            updated_at=iso_time(job.updated_at),
            progress=job.progress,
            run_dir=str(self._runs_dir / job.id),
            spec=job.spec if with_spec else None,
        )


class _Edge:
    """Counts requests and the time to their answer, and refuses those that come while the gateway drains.

    The route's pattern is the label, never the path.
    """

    def __init__(self, app: ASGIApp, stop: asyncio.Event) -> None:
        self._app = app
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        if self._stop.is_set():
            # A kept connection would go on asking a server that is ending.
            refusal = problems.problem(503, "the gateway is stopping", {"Connection": "close"})
            await refusal(scope, receive, send)
            return

        async def measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "unknown")
                metrics.REQUESTS.labels(scope["method"], route, str(message["status"])).inc()
                metrics.REQUEST_SECONDS.labels(route).observe(time.monotonic() - began)
            await send(message)

        await self._app(scope, receive, measured)


_DOCUMENT_TYPES = ("application/json", "application/yaml")
# Local references would point outside the request's schema: the parts are written in place of a name.
_JOB_SCHEMA = {"schema": JobSpec.model_json_schema() | {"$id": "urn:longshore:job-spec"}}
_PROBLEM = {"content": {problems.MEDIA_TYPE: {"schema": {"type": "object"}}}}
_PROBLEMS: dict[int | str, dict[str, object]] = {
    401: {"description": "No or a wrong API key", **_PROBLEM},
    404: {"description": "No such job", **_PROBLEM},
    422: {"description": "Wrong parameters, or a job spec with faults", **_PROBLEM},
}
