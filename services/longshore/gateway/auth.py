"""Who a request is from: an API key, checked against the database, the gateway's root key, or an OIDC token.

A handler says what it needs by the type of a parameter: `Viewer`, `Submitter`, `Admin`, or a job that its caller may
look at (`ViewedJob`) or steer (`SteeredJob`). There is no other way to a job, so that none is forgotten.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from longshore.errors import Forbidden, NotFound
from longshore.gateway.api_keys import ApiKeys
from longshore.gateway.oidc import Tokens
from longshore.gateway.principal import Principal, Role
from longshore.gateway.problems import Problem
from longshore.gateway.rate_limit import Rate, RateLimiter
from longshore.gateway.store import Job

# Of one key.
CALLER_RATE = Rate(per_s=100, burst=1000)
# Wrong keys from one address.
STRANGER_RATE = Rate(per_s=1, burst=60)
ROOT = "root"
_JOB_ID = re.compile(r"[a-z0-9-]{1,64}")


class Authenticator:
    """Checks keys, and how often each caller asks."""

    def __init__(self, keys: ApiKeys, root_key: str, rate: Rate = CALLER_RATE, tokens: Tokens | None = None) -> None:
        """
        Args:
            root_key: of the role admin in every project; what makes the first keys.
            tokens: OIDC tokens that are taken beside keys.
        """
        self._keys = keys
        self._tokens = tokens
        self._root_digest = _digest(root_key)
        self._callers = RateLimiter(rate)
        self._strangers = RateLimiter(STRANGER_RATE)

    async def __call__(self, text: str, address: str) -> Principal:
        """Whose key a text is. Raises Problem: 401, 429."""
        caller = await self._find(text)
        now = time.monotonic()
        if caller is None:
            # Whoever has a key is let in whatever others send from there: behind a proxy all have one address.
            _check_rate(self._strangers.take(address, now))
            detail = "send Authorization: Bearer <API key>, with one that is known and has neither expired nor ended"
            raise Problem(401, detail, {"WWW-Authenticate": "Bearer"})
        _check_rate(self._callers.take(caller.id, now))
        return caller

    async def _find(self, text: str) -> Principal | None:
        # Digests have one length, so the comparison tells nothing of the key's.
        if hmac.compare_digest(_digest(text), self._root_digest):
            return Principal(ROOT, None, Role.ADMIN)
        key = await self._keys.find(text)
        if key is not None:
            return key.principal
        return await self._tokens.find(text) if self._tokens is not None else None


def _check_rate(wait_s: float) -> None:
    if wait_s:
        raise Problem(429, f"too many requests; the next in {wait_s:.1f} s", {"Retry-After": str(math.ceil(wait_s))})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


_bearer = HTTPBearer(
    auto_error=False, scheme_name="api_key", description="An API key (`longshore keys create`), or an OIDC token"
)


async def _caller(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Principal:
    text = credentials.credentials.strip() if credentials else ""
    address = request.client.host if request.client else ""
    caller: Principal = await request.app.state.authenticate(text, address)
    request.state.principal = caller
    return caller


def _needs(role: Role) -> Callable[[Principal], Awaitable[Principal]]:
    async def check(caller: Annotated[Principal, Depends(_caller)]) -> Principal:
        if not caller.may(role):
            raise Forbidden(f"this needs the role {role.word}; {caller.id} is a {caller.role.word}")
        return caller

    return check


# Of a rollout site's own key, too.
Site = Annotated[Principal, Depends(_needs(Role.SITE))]
Viewer = Annotated[Principal, Depends(_needs(Role.VIEWER))]
Submitter = Annotated[Principal, Depends(_needs(Role.SUBMITTER))]
Admin = Annotated[Principal, Depends(_needs(Role.ADMIN))]


async def _viewed(job_id: str, caller: Viewer, request: Request) -> Job:
    if not _JOB_ID.fullmatch(job_id):
        raise NotFound(f"there is no job {job_id}")
    job: Job = await request.app.state.store.get(job_id, caller.project)
    # The audit log tells the project whose job it was, whoever came.
    request.state.project = job.project
    return job


async def _steered(job: Annotated[Job, Depends(_viewed)], caller: Submitter) -> Job:
    return job


ViewedJob = Annotated[Job, Depends(_viewed)]
SteeredJob = Annotated[Job, Depends(_steered)]
