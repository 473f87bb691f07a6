"""The routes about tenants: API keys, projects and their quotas, the audit log, who the caller is."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import pydantic
import structlog
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from fastapi.responses import Response
from pydantic import ConfigDict, Field

from longshore.api_types import ApiKeyList, ApiKeyView, AuditPage, Caller, NewApiKey, ProjectList, ProjectView, Quotas
from longshore.config import NAME_PATTERN
from longshore.errors import Conflict, Forbidden
from longshore.gateway.api_keys import ApiKey, ApiKeys
from longshore.gateway.audit import AuditLog, AuditRow
from longshore.gateway.auth import Admin, Viewer
from longshore.gateway.body import read_model
from longshore.gateway.places import Limits, Use
from longshore.gateway.principal import ROLES, Principal
from longshore.gateway.projects import Projects
from longshore.gateway.responses import READS, STEERS, TAKES
from longshore.gateway.states import JobState
from longshore.gateway.store import JobStore
from longshore.gateway.streams import iso_time

log = structlog.get_logger()

MAX_ENTRIES = 1000
_MAX_LIMIT = 1_000_000
_DAY_S = 86_400.0
ProjectName = Annotated[str, InPath(pattern=NAME_PATTERN)]
KeyId = Annotated[str, InPath(pattern=r"^[0-9a-f]{12}$")]
Limit = Annotated[int | None, Field(ge=0, le=_MAX_LIMIT)]


class KeyBody(pydantic.BaseModel):
    """Example: {"project": "vision", "role": "submitter", "name": "nightly runs", "days": 90}"""

    model_config = ConfigDict(extra="forbid", strict=True)

    project: str | None = Field(None, pattern=NAME_PATTERN, description="absent: the caller's, or every project")
    role: Literal["viewer", "submitter", "admin"]
    name: str = Field("", max_length=128, description="what it is for, for people")
    days: float | None = Field(90.0, gt=0, le=3650, description="until it expires; null: never")


class RotateBody(pydantic.BaseModel):
    """Example: {"grace_s": 3600}"""

    model_config = ConfigDict(extra="forbid", strict=True)

    grace_s: float = Field(0.0, ge=0, le=30 * _DAY_S, description="for how long the old key is still taken")


class QuotaBody(pydantic.BaseModel):
    """Example: {"max_jobs": 4, "max_generators": 16, "max_gpus": 20}; null: no limit of the project's own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_jobs: Limit = None
    max_generators: Limit = None
    max_gpus: Limit = None


class AdminRoutes:
    """The routes over one database."""

    def __init__(self, keys: ApiKeys, projects: Projects, audit: AuditLog, store: JobStore) -> None:
        self._keys = keys
        self._projects = projects
        self._audit = audit
        self._store = store

    def add_to(self, router: APIRouter) -> None:
        """Adds every route."""
        tags: dict[str, Any] = {"tags": ["tenants"]}
        reads: dict[str, Any] = {**tags, "methods": ["GET"], "responses": READS}
        gone: dict[str, Any] = {
            **tags,
            "methods": ["DELETE"],
            "status_code": 204,
            "response_class": Response,
            "responses": STEERS,
        }
        add = router.add_api_route
        add("/caller", self.caller, operation_id="caller", **reads)
        add("/keys", self.list_keys, operation_id="keys", **reads)
        create, rotate = takes(KeyBody, required=True), takes(RotateBody, required=False)
        add("/keys", self.create_key, operation_id="create_key", methods=["POST"], status_code=201, **create, **tags)
        path = "/keys/{key_id}"
        add(
            path + "/rotate",
            self.rotate_key,
            operation_id="rotate_api_key",
            methods=["POST"],
            status_code=201,
            **rotate,
            **tags,
        )
        add(path, self.revoke_key, operation_id="revoke_key", **gone)
        add("/projects", self.list_projects, operation_id="projects", **reads)
        quotas = takes(QuotaBody, required=True)
        add("/projects/{project}", self.set_quotas, operation_id="set_quotas", methods=["PUT"], **quotas, **tags)
        add("/audit", self.audit, operation_id="audit", **reads)

    async def caller(self, caller: Viewer) -> Caller:
        """Who the key says that the caller is."""
        return {"principal": caller.id, "project": caller.project, "role": caller.role.word}

    async def list_keys(self, caller: Admin) -> ApiKeyList:
        """The keys of the caller's project that can be used, without their secrets."""
        return {"keys": [_key(key) for key in await self._keys.list(caller.project)]}

    async def create_key(self, request: Request, caller: Admin) -> NewApiKey:
        """Makes a key. It is shown in this answer and never again."""
        body = await read_model(request, KeyBody)
        project = body.project if body.project is not None else caller.project
        if not caller.sees(project):
            raise Forbidden(f"{caller.id} may make keys of project {caller.project} only")
        expires_at = None if body.days is None else time.time() + body.days * _DAY_S
        key, text = await self._keys.create(project, ROLES[body.role], body.name, expires_at)
        log.info("API key made", key=key.id, project=project, role=body.role, principal=caller.id)
        return {**_key(key), "key": text}

    async def rotate_key(self, key_id: KeyId, request: Request, caller: Admin) -> NewApiKey:
        """Makes a key of the same project, role and time to live; the old one ends after `grace_s`."""
        body = await read_model(request, RotateBody)
        old = await self._usable(key_id, caller)
        now = time.time()
        expires_at = None if old.expires_at is None else now + (old.expires_at - old.created_at)
        key, text = await self._keys.create(old.project, old.role, old.name, expires_at, old.id)
        await self._keys.revoke(old.id, now + body.grace_s)
        log.info("API key rotated", key=key.id, successor_of=old.id, principal=caller.id)
        return {**_key(key), "key": text}

    async def revoke_key(self, key_id: KeyId, caller: Admin) -> Response:
        """Ends a key at once."""
        await self._usable(key_id, caller)
        await self._keys.revoke(key_id, time.time())
        log.info("API key revoked", key=key_id, principal=caller.id)
        return Response(status_code=204)

    async def list_projects(self, caller: Viewer) -> ProjectList:
        """Quotas and use of the caller's project; of every one that has any, for a caller of every project."""
        quotas = await self._projects.quotas()
        used: dict[str, Use] = {}
        queued: dict[str, int] = {}
        for job in await self._store.unfinished():
            if job.state is JobState.QUEUED:
                queued[job.project] = queued.get(job.project, 0) + 1
            elif job.state is not JobState.PAUSED:
                used[job.project] = used.get(job.project, Use()) + Use(1, job.generators, job.gpus)
        names = {*quotas, *used, *queued} if caller.project is None else {caller.project}
        return {
            "projects": [
                _project(name, quotas.get(name, Limits()), used.get(name, Use()), queued.get(name, 0))
                for name in sorted(names)
            ]
        }

    async def set_quotas(self, project: ProjectName, request: Request, caller: Admin) -> Quotas:
        """Sets what a project may use at a time. Only for a caller of every project."""
        if caller.project is not None:
            raise Forbidden("quotas are set by somebody with a key of every project")
        body = await read_model(request, QuotaBody)
        await self._projects.set_quotas(project, Limits(body.max_jobs, body.max_generators, body.max_gpus))
        return {"max_jobs": body.max_jobs, "max_generators": body.max_generators, "max_gpus": body.max_gpus}

    async def audit(
        self,
        caller: Admin,
        limit: Annotated[int, Query(ge=1, le=MAX_ENTRIES)] = 100,
        before: Annotated[int | None, Query(ge=0, lt=2**63, description="`next` of the page before")] = None,
    ) -> AuditPage:
        """Requests that were to change something, newest first; of the caller's project alone."""
        found = await self._audit.newest(limit + 1, caller.project, before)
        page = found[:limit]
        return {"entries": [_entry(row) for row in page], "next": page[-1].id if len(found) > limit else None}

    async def _usable(self, key_id: str, caller: Principal) -> ApiKey:
        key = await self._keys.get(key_id, caller.project)
        if key.revoked_at is not None and key.revoked_at <= time.time():
            raise Conflict(f"API key {key_id} was revoked")
        return key


def takes(body: type[pydantic.BaseModel], required: bool) -> dict[str, Any]:
    """What the OpenAPI document says of a route that reads this body by `read_model`."""
    content = {"application/json": {"schema": body.model_json_schema()}}
    return {"responses": TAKES, "openapi_extra": {"requestBody": {"required": required, "content": content}}}


def _key(key: ApiKey) -> ApiKeyView:
    return {
        "id": key.id,
        "project": key.project,
        "role": key.role.word,
        "name": key.name,
        "created_at": iso_time(key.created_at),
        "expires_at": None if key.expires_at is None else iso_time(key.expires_at),
        "revoked_at": None if key.revoked_at is None else iso_time(key.revoked_at),
        "successor_of": key.successor_of,
    }


def _project(name: str, limits: Limits, used: Use, queued: int) -> ProjectView:
    return {
        "name": name,
        "max_jobs": limits.jobs,
        "max_generators": limits.generators,
        "max_gpus": limits.gpus,
        "jobs": used.jobs,
        "generators": used.generators,
        "gpus": used.gpus,
        "queued": queued,
    }


def _entry(row: AuditRow) -> Any:
    return {
        "id": row.id,
        "at": iso_time(row.time),
        "project": row.project,
        "principal": row.principal,
        "method": row.method,
        "path": row.path,
        "status": row.status,
        "request_id": row.request_id,
    }
