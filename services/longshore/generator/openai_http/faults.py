"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

from longshore import errors
from longshore.generator.engine import Failure, QueueFull, RequestFailed

# A full queue moves on within seconds; so does a generator that waits for its first version.
RETRY_AFTER_S = "1"
# Clients of OpenAI's try again by themselves after some statuses, unless they are told not to.
_NO_RETRY = {"x-should-retry": "false"}


class ApiError(Exception):
    """What a caller is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        """
        Args:
            param: the request's field that is wrong, as a path: messages.0.content.
            code: a stable word for programs.
            kind: OpenAI's `type`.
        """
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A request with a wrong field, which the message names."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(model: str, served: str) -> ApiError:
    """There is no such model here."""
    message = f"the model {model!r} does not exist here; this generator serves {served!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def too_many(message: str) -> ApiError:
    """There is no room now."""
    return ApiError(
        429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers={"retry-after": RETRY_AFTER_S}
    )


def of_longshore(error: errors.LongshoreError) -> ApiError:
    """What one of our own errors is to a caller."""
    if isinstance(error, QueueFull):
        return too_many(str(error))
    if isinstance(error, errors.Unavailable):
        return ApiError(
            503, str(error), kind="server_error", code="unavailable", headers={"retry-after": RETRY_AFTER_S}
        )
    if isinstance(error, errors.NotFound):
        return ApiError(404, str(error), code="version_not_found")
    if isinstance(error, errors.Rejected | errors.ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, errors.IntegrityError):
        # The version that was asked for cannot be proven; asking again at once changes nothing.
        return ApiError(503, str(error), kind="server_error", code="version_not_proven", headers=_NO_RETRY)
    return ApiError(500, str(error), kind="server_error", code="internal", headers=_NO_RETRY)


def of_failure(failed: RequestFailed) -> ApiError:
    """Why the engine did not finish a reply."""
    if failed.failure is Failure.DEADLINE:
        return ApiError(504, failed.message, kind="server_error", code="timeout", headers=_NO_RETRY)
    if failed.failure is Failure.REFUSED:
        return ApiError(400, failed.message)
    return ApiError(404, failed.message, code="version_not_found")


def internal(request_id: str) -> ApiError:
    """A bug of ours. Its text may hold anything: it goes to our log, not to the caller."""
    message = f"internal error; the generator's log has it under {request_id}"
    return ApiError(500, message, kind="server_error", code="internal", headers=_NO_RETRY)
