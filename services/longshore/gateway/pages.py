"""Cursors of paged lists: opaque to callers, and refused when they are not one of ours."""

from __future__ import annotations

import base64
import json
import math

from longshore.gateway.problems import Problem


def cursor_of(created_at: float, job_id: str) -> str:
    """Where the page after this job begins."""
    return base64.urlsafe_b64encode(json.dumps([created_at, job_id]).encode()).decode().rstrip("=")


def read_cursor(cursor: str | None) -> tuple[float, str] | None:
    """Raises Problem 422."""
    if cursor is None:
        return None
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        created_at, job_id = json.loads(text)
        if not (isinstance(created_at, float) and math.isfinite(created_at) and isinstance(job_id, str)):
            raise ValueError(cursor)
        if "\0" in job_id or len(job_id) > 64:
            raise ValueError(cursor)
        job_id.encode("utf-8")
    except (ValueError, TypeError, RecursionError):
        raise Problem(422, f"the cursor {cursor[:80]!r} is none: send what `next` of the page before says") from None
    return created_at, job_id
