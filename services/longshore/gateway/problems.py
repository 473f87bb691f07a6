"""Every error of the REST API as application/problem+json (RFC 9457), whoever raised it."""

from __future__ import annotations

import json
from http import HTTPStatus

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from longshore import errors

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
_MAX_VALUE_CHARACTERS = 1000
# Faults in one answer; whoever has more of them sees these first.
_MAX_FAULTS = 200
_STATUSES: list[tuple[type[errors.LongshoreError], int]] = [
    (errors.InvalidJobSpec, 422),
    (errors.Forbidden, 403),
    (errors.NotFound, 404),
    (errors.Conflict, 409),
    (errors.Rejected, 400),
    (errors.Unavailable, 503),
    # What a store or a broker sent is damaged: nothing that the caller can mend.
    (errors.IntegrityError, 503),
]


class _AsciiResponse(JSONResponse):
    """JSON in ASCII: half characters of a stranger's text have no UTF-8."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


class Problem(HTTPException):
    """An error with a status of HTTP's own: 401, 413, 415."""


def problem(
    status: int, detail: str, request_id: str, headers: dict[str, str] | None = None, **more: object
) -> JSONResponse:
    """A problem document; `more` are further members."""
    title = HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, "request_id": request_id, **more}
    return _AsciiResponse(body, status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Makes the app answer every error with a problem document."""

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers) if error.headers else None
        return problem(error.status_code, str(error.detail), _id(request), headers)

    # FastAPI's own validation of path and query parameters.
    @app.exception_handler(RequestValidationError)
    async def on_parameters(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [
            errors.Fault(".".join(str(part) for part in entry["loc"]), entry["input"], entry["msg"])
            for entry in error.errors()
        ]
        return problem(422, "the request's parameters are wrong", _id(request), faults=_plain_faults(faults))

    @app.exception_handler(errors.LongshoreError)
    async def on_longshore(request: Request, error: errors.LongshoreError) -> JSONResponse:
        status = next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)
        if isinstance(error, errors.InvalidJobSpec):
            number = len(error.faults)
            listed = f"; the first {_MAX_FAULTS} are listed" if number > _MAX_FAULTS else ""
            detail = f"the job has {number} fault{'s' * (number != 1)}{listed}"
            return problem(status, detail, _id(request), faults=_plain_faults(error.faults))
        return problem(status, str(error), _id(request))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        # A bug's text may hold anything: it goes to our log, not to the caller.
        log.error("request failed", path=request.url.path, exc_info=error)
        return problem(500, "internal error; see the gateway's log", _id(request))


def _id(request: Request) -> str:
    return str(request.state.request_id)


def _plain_faults(faults: list[errors.Fault]) -> list[dict[str, object]]:
    return [
        {"path": fault.path, "value": _plain(fault.value), "message": fault.message} for fault in faults[:_MAX_FAULTS]
    ]


def _plain(value: object) -> object:
    """The value itself where JSON can hold it in little room, else the beginning of its text."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return repr(type(value))
    return value if len(text) <= _MAX_VALUE_CHARACTERS else text[:_MAX_VALUE_CHARACTERS] + "..."
