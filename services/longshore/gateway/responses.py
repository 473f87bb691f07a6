"""What routes answer beside what was asked for, as OpenAPI tells it: problems, by their status."""

from __future__ import annotations

from typing import Any

from longshore.gateway.problems import MEDIA_TYPE

Responses = dict[int | str, dict[str, Any]]

PROBLEM_SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "RFC 9457. `faults` lists what is wrong with a request, where that can be told part by part.",
    "type": "object",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "request_id": {"type": "string"},
        "faults": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["path", "message"],
                "properties": {"path": {"type": "string"}, "value": {}, "message": {"type": "string"}},
            },
        },
    },
}
HEADERS: dict[str, Any] = {
    "RequestId": {
        "description": "The caller's own X-Request-Id where it sent a sound one, else one of the gateway's.",
        "schema": {"type": "string"},
    }
}
_TEXTS = {
    400: "The body cannot be read as what its Content-Type says, or the weight store refuses it",
    401: "No API key, or one that is not known, has expired or was revoked",
    403: "The key's role or project does not allow it",
    404: "There is no such thing in the key's project",
    408: "The body did not arrive in time",
    409: "The present state does not allow it",
    413: "The body is too large",
    415: "The body is of another type than can be read",
    422: "Wrong parameters, or a document with faults",
    429: "Too many requests; Retry-After says when the next may come",
    503: "The gateway, its database, the broker or the weight store is away; worth a retry",
}


def problems(*statuses: int) -> Responses:
    """Responses that a route may give, beside those that every route may."""
    return {status: _problem(status) for status in sorted({401, 403, 422, 429, 503, *statuses})}


def _problem(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": _TEXTS[status], "content": {MEDIA_TYPE: {"schema": schema}}}


READS = problems(404)
STEERS = problems(400, 404, 409)
# Routes with a body.
TAKES = problems(400, 404, 408, 409, 413, 415)
