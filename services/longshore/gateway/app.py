"""The REST API put together: its routes, what stands before them, and its OpenAPI document."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI

import longshore
from longshore.api_types import Health
from longshore.gateway import problems
from longshore.gateway.admin_routes import AdminRoutes
from longshore.gateway.api_keys import ApiKeys
from longshore.gateway.audit import AuditLog
from longshore.gateway.auth import Authenticator
from longshore.gateway.books import Books
from longshore.gateway.data_routes import DataRoutes
from longshore.gateway.edge import Edge
from longshore.gateway.forks import Forks
from longshore.gateway.job_routes import JobRoutes
from longshore.gateway.jobs import Jobs
from longshore.gateway.projects import Projects
from longshore.gateway.responses import HEADERS, PROBLEM_SCHEMA
from longshore.gateway.rollout_views import Rollouts
from longshore.gateway.site_access import SiteAccess
from longshore.gateway.site_routes import SiteRoutes
from longshore.gateway.ticket_routes import TicketRoutes
from longshore.gateway.units import Units
from longshore.gateway.version_routes import Rotate, VersionRoutes
from longshore.gateway.versions import Versions


@dataclass(frozen=True)
class Services:
    """What the routes translate to."""

    jobs: Jobs
    books: Books
    rollouts: Rollouts
    versions: Versions
    units: Units
    keys: ApiKeys
    projects: Projects
    audit: AuditLog
    sites: SiteAccess
    authenticate: Authenticator
    rotate: Rotate
    runs_dir: Path


def make_app(services: Services, stop: asyncio.Event) -> FastAPI:
    """The ASGI application; its event streams end when `stop` is set."""
    app = FastAPI(
        title="Longshore",
        summary="Reinforcement learning with verifiable rewards, over several clusters.",
        version=longshore.__version__,
        docs_url=None,
        redoc_url=None,
    )
    app.state.authenticate = services.authenticate
    app.state.store = services.jobs.store
    problems.install(app)
    app.add_api_route("/healthz", _health, methods=["GET"], operation_id="healthz", tags=["gateway"])
    router = APIRouter(prefix="/v1")
    forks = Forks(services.jobs, services.versions, services.runs_dir)
    JobRoutes(services.jobs, forks, services.runs_dir, stop).add_to(router)
    DataRoutes(services.rollouts, services.books, services.units, services.runs_dir).add_to(router)
    TicketRoutes(services.books).add_to(router)
    VersionRoutes(services.versions, services.rotate, services.runs_dir).add_to(router)
    AdminRoutes(services.keys, services.projects, services.audit, services.jobs.store).add_to(router)
    SiteRoutes(services.sites).add_to(router)
    app.include_router(router)
    app.add_middleware(Edge, stop=stop, audit=services.audit)
    _finish_document(app)
    return app


async def _health() -> Health:
    """Whether the gateway serves. Needs no key."""
    return {"status": "serving", "version": longshore.__version__}


def _finish_document(app: FastAPI) -> None:
    """Has the document say what the routes leave out: the id of every answer, and what a problem looks like."""
    make = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = make()
            made["components"].setdefault("schemas", {})["Problem"] = PROBLEM_SCHEMA
            made["components"].setdefault("headers", {}).update(HEADERS)
            for path in made["paths"].values():
                for operation in path.values():
                    for response in operation["responses"].values():
                        response.setdefault("headers", {})["X-Request-Id"] = {"$ref": "#/components/headers/RequestId"}
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
