"""What answers mean: errors by their kind, events line by line. Shared by both clients; sends nothing."""

from __future__ import annotations

import ipaddress
import json
from typing import Any
from urllib.parse import urlsplit

import httpx

from longshore.errors import (
    ConfigError,
    Conflict,
    Fault,
    Forbidden,
    InvalidJobSpec,
    LongshoreError,
    NotFound,
    Unavailable,
)

# Submitting runs the tasks' own checks, which may read a data set.
TIMEOUT = httpx.Timeout(90.0, connect=5.0)
# An event stream says something at least every 15 s.
STREAM_TIMEOUT = httpx.Timeout(45.0, connect=5.0)
# A gateway that was killed is back within seconds.
AWAY_S = 60.0
RETRY_S = 0.5
# Dead letters a request.
PAGE = 200
ENDED = frozenset({"succeeded", "failed", "cancelled"})

Json = dict[str, Any]


def checked_url(url: str, where: str) -> str:
    """A gateway's URL, where a key may be sent. Raises ConfigError: it would go over a network in the clear.

    Args:
        where: what the URL came from.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https" and host:
        return url.rstrip("/")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if parts.scheme == "http" and local:
        return url.rstrip("/")
    raise ConfigError(f"{where} {url}: must be https://, or http:// on this machine: a key goes with each request")


def error_of(status: int, body: bytes) -> LongshoreError:
    """The error that a problem document stands for."""
    try:
        problem: Json = json.loads(body)
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    detail = str(problem.get("detail") or f"HTTP status {status}")
    if status == httpx.codes.UNPROCESSABLE_ENTITY and problem.get("faults"):
        return InvalidJobSpec([Fault(item["path"], item.get("value"), item["message"]) for item in problem["faults"]])
    kinds: dict[int, type[LongshoreError]] = {
        401: Forbidden,
        403: Forbidden,
        404: NotFound,
        409: Conflict,
        429: Unavailable,
        503: Unavailable,
    }
    return kinds.get(status, LongshoreError)(detail)


def unreachable(url: str, error: httpx.HTTPError) -> Unavailable:
    """What a request that was not answered means."""
    if isinstance(error, httpx.ConnectError):
        return Unavailable(f"the stack at {url} does not answer")
    return Unavailable(f"the stack at {url} broke off: {error or type(error).__name__}")


def may_repeat(error: httpx.HTTPError, repeatable: bool) -> bool:
    """Whether a request can be sent again: nobody heard it, or hearing it twice does no harm."""
    return isinstance(error, httpx.ConnectError) or (repeatable and isinstance(error, httpx.TransportError))


class EventLines:
    """Server-sent events, a line at a time."""

    def __init__(self) -> None:
        self._id = ""

    def take(self, line: str) -> tuple[str, Json | None] | None:
        """(id, event) once one is whole; ("", None) for a sign of life; None while there is nothing to tell."""
        if line.startswith("id: "):
            self._id = line.removeprefix("id: ")
        elif line.startswith("data: "):
            return self._id, json.loads(line.removeprefix("data: "))
        elif line.startswith(":"):
            return "", None
        return None


def is_last(event: Json) -> bool:
    """Whether an event is that of a job's terminal state."""
    return event["type"] == "state" and event["state"] in ENDED
