"""What every request passes on its way in and out: its id, the draining gateway's refusal, metrics, the audit log."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longshore.errors import Unavailable
from longshore.gateway import metrics, problems
from longshore.gateway.audit import AuditLog
from longshore.gateway.principal import Principal

log = structlog.get_logger()

REQUEST_ID = "X-Request-Id"
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_SAFE = ("GET", "HEAD", "OPTIONS")
# A method may be any word: as a label of metrics, a stranger's words would fill the memory.
_METHODS = frozenset({*_SAFE, "POST", "PUT", "PATCH", "DELETE"})


class Edge:
    """The outermost layer. The route's pattern is the label of its metrics, never the path."""

    def __init__(self, app: ASGIApp, stop: asyncio.Event, audit: AuditLog) -> None:
        self._app = app
        self._stop = stop
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        # A caller's own id makes its log and ours one story.
        asked = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = asked if _ID.fullmatch(asked) else secrets.token_hex(12)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
                route = getattr(scope.get("route"), "path", "unknown")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                metrics.REQUESTS.labels(method, route, str(message["status"])).inc()
                metrics.REQUEST_SECONDS.labels(route).observe(time.monotonic() - began)
                # Before the answer: what was answered was written down.
                await self._note(scope, state, message["status"])
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            if self._stop.is_set():
                # A kept connection would go on asking a server that is ending.
                refusal = problems.problem(503, "the gateway is stopping", request_id, {"Connection": "close"})
                await refusal(scope, receive, measured)
                return
            await self._app(scope, receive, measured)

    async def _note(self, scope: Scope, state: MutableMapping[str, Any], status: int) -> None:
        caller: Principal | None = state.get("principal")
        if caller is None or scope["method"] in _SAFE:
            return
        try:
            # As it was sent: what is escaped in it may be anything.
            path = scope["raw_path"].decode("ascii", "replace")
            project = state.get("project", caller.project)
            await self._audit.add(project, caller.id, scope["method"], path, status, state["request_id"])
        except Unavailable as error:
            # What was asked for is done, or was refused; the process's log has to do.
            log.error("not in the audit log", principal=caller.id, path=scope["path"], status=status, reason=str(error))
