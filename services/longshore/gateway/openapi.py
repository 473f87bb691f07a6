"""Prints the OpenAPI document of the REST API (`make openapi`). Opens no file and no connection."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from longshore.gateway.api_keys import ApiKeys
from longshore.gateway.app import Services, make_app
from longshore.gateway.audit import AuditLog
from longshore.gateway.auth import Authenticator
from longshore.gateway.books import Books
from longshore.gateway.database import Database
from longshore.gateway.jobs import Jobs
from longshore.gateway.projects import Projects
from longshore.gateway.rollout_views import Rollouts
from longshore.gateway.site_access import SiteAccess
from longshore.gateway.site_certificates import SiteCertificates
from longshore.gateway.store import Job, JobStore
from longshore.gateway.units import Units
from longshore.gateway.versions import Versions
from longshore.launcher.client import SupervisorClient
from longshore.launcher.plan import JobPaths
from longshore.rollout_queue import broker
from longshore.rollout_queue.site_users import SiteUsers
from longshore.tasks.check import check_document

_NOWHERE = Path("/nonexistent")


async def document() -> dict[str, Any]:
    """The document of an API whose parts were made and never used."""
    database = Database("sqlite+aiosqlite://")
    store, projects, redis = JobStore(database), Projects(database), broker.connect("unix:///nonexistent")
    launcher = SupervisorClient("unix:///nonexistent")
    services = Services(
        jobs=Jobs(store, projects, check_document, _NOWHERE),
        books=Books(redis, _NOWHERE),
        rollouts=Rollouts(redis, _NOWHERE),
        versions=Versions("unix:///nonexistent", lambda job_id: JobPaths(_NOWHERE, _NOWHERE)),
        units=Units(launcher),
        keys=ApiKeys(database),
        projects=projects,
        audit=AuditLog(database),
        sites=SiteAccess(None, SiteCertificates(database), ApiKeys(database), SiteUsers(redis)),
        authenticate=Authenticator(ApiKeys(database), ""),
        rotate=_rotate,
        runs_dir=_NOWHERE,
    )
    made = make_app(services, asyncio.Event()).openapi()
    await launcher.close()
    return made


async def _rotate(job: Job) -> str:
    raise AssertionError("nothing is called")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(document()), indent=1, ensure_ascii=False) + "\n")
