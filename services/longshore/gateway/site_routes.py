"""The routes about rollout sites: who has joined, joining, renewing, revoking."""

from __future__ import annotations

import time
from typing import Annotated, Any

import pydantic
import structlog
from fastapi import APIRouter, Request
from fastapi import Path as InPath
from fastapi.responses import Response
from pydantic import ConfigDict, Field

from longshore.api_types import IssuedCredential, SiteCredentialList, SiteCredentialView
from longshore.config import HOME_SITE, NAME_PATTERN
from longshore.errors import Conflict, Forbidden, NotFound
from longshore.gateway.admin_routes import takes
from longshore.gateway.auth import Admin, Site
from longshore.gateway.body import read_model
from longshore.gateway.principal import Principal, Role
from longshore.gateway.responses import READS, STEERS
from longshore.gateway.site_access import Joined, SiteAccess
from longshore.gateway.site_certificates import SiteCertificate
from longshore.gateway.streams import iso_time
from longshore.sites.certificates import MAX_REQUEST_BYTES

log = structlog.get_logger()

SiteName = Annotated[str, InPath(pattern=NAME_PATTERN)]
CertificateRequest = Annotated[
    str, Field(max_length=MAX_REQUEST_BYTES, description="PKCS #10 in PEM, of a key on the curve P-256")
]
Days = Annotated[float, Field(gt=0, le=366)]


class JoinBody(pydantic.BaseModel):
    """Example: {"site": "west", "project": "vision", "request": "-----BEGIN CERTIFICATE REQUEST---...", "days": 30}"""

    model_config = ConfigDict(extra="forbid", strict=True)

    site: str = Field(pattern=NAME_PATTERN)
    project: str | None = Field(None, pattern=NAME_PATTERN, description="absent: every project's jobs")
    request: CertificateRequest
    days: Days = Field(30.0, description="until the credential expires")


class RenewBody(pydantic.BaseModel):
    """Example: {"request": "-----BEGIN CERTIFICATE REQUEST-----..."}"""

    model_config = ConfigDict(extra="forbid", strict=True)

    request: CertificateRequest


class SiteRoutes:
    """The routes over one home's sites."""

    def __init__(self, access: SiteAccess) -> None:
        self._access = access

    def add_to(self, router: APIRouter) -> None:
        """Adds every route."""
        tags: dict[str, Any] = {"tags": ["sites"]}
        add, join, renew = router.add_api_route, takes(JoinBody, required=True), takes(RenewBody, required=True)
        add("/sites", self.list, operation_id="joined_sites", methods=["GET"], responses=READS, **tags)
        add("/sites", self.join, operation_id="join_site", methods=["POST"], status_code=201, **join, **tags)
        path = "/sites/{site}"
        add(
            path + "/renew",
            self.renew,
            operation_id="renew_site",
            methods=["POST"],
            status_code=201,
            **renew,
            **tags,
        )
        add(
            path,
            self.revoke,
            operation_id="revoke_site",
            methods=["DELETE"],
            status_code=204,
            response_class=Response,
            responses=STEERS,
            **tags,
        )

    async def list(self, caller: Admin) -> SiteCredentialList:
        """Rollout sites that have joined for the caller's project, and how their credentials are."""
        return {"sites": [_view(record) for record in await self._access.records.newest(caller.project)]}

    async def join(self, request: Request, caller: Admin) -> IssuedCredential:
        """Lets a rollout site in. Its secrets are in this answer and nowhere else. For a caller of every project."""
        _check_everywhere(caller)
        body = await read_model(request, JoinBody)
        if body.site == HOME_SITE:
            raise Conflict(f"{HOME_SITE} is the home site's own name; take another")
        joined = await self._access.join(body.site, body.project, body.request.encode(), body.days)
        log.info("site joined", site=body.site, project=body.project, serial=joined.record.serial, principal=caller.id)
        return self._issued(joined)

    async def renew(self, site: SiteName, request: Request, caller: Site) -> IssuedCredential:
        """Gives a site another certificate, for as many days as it had. For the site's own key, or for a caller of
        every project with the role admin."""
        if caller.role is Role.SITE:
            await self._check_own(site, caller)
        elif caller.may(Role.ADMIN):
            _check_everywhere(caller)
        else:
            raise Forbidden(f"a site is renewed by its own key or by an admin; {caller.id} is a {caller.role.word}")
        body = await read_model(request, RenewBody)
        joined = await self._access.renew(site, body.request.encode())
        log.info("site renewed", site=site, serial=joined.record.serial, principal=caller.id)
        return self._issued(joined)

    async def revoke(self, site: SiteName, caller: Admin) -> Response:
        """Puts a site out at once: its certificates, its user at the broker, its key. For a caller of every project."""
        _check_everywhere(caller)
        await self._access.revoke(site)
        log.info("site revoked", site=site, principal=caller.id)
        return Response(status_code=204)

    async def _check_own(self, site: str, caller: Principal) -> None:
        try:
            own = await self._access.site_of_key(caller.id.removeprefix("key:"))
        except NotFound:
            own = ""
        if own != site:
            raise Forbidden(f"{caller.id} is not the key of site {site}, or that has no credential which is good")

    def _issued(self, joined: Joined) -> IssuedCredential:
        settings = self._access.settings
        return {
            **_view(joined.record),
            "certificate": joined.certificate.decode(),
            "authority": settings.authority_of_home.decode(),
            "weights": settings.weights,
            "gateway": settings.gateway,
            "broker_url": joined.broker_url,
            "api_key": joined.api_key,
        }


def _check_everywhere(caller: Principal) -> None:
    if caller.project is not None:
        raise Forbidden("sites are let in and put out by somebody with a key of every project")


def _view(record: SiteCertificate) -> SiteCredentialView:
    return {
        "site": record.site,
        "project": record.project,
        "state": _state(record, time.time()),
        "serial": record.serial,
        "issued_at": iso_time(record.issued_at),
        "expires_at": iso_time(record.expires_at),
        "revoked_at": None if record.revoked_at is None else iso_time(record.revoked_at),
    }


def _state(record: SiteCertificate, now: float) -> str:
    if record.revoked_at is not None:
        return "revoked"
    if now >= record.expires_at:
        return "expired"
    return "expiring" if 3 * (record.expires_at - now) < record.expires_at - record.issued_at else "good"
