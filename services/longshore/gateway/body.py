"""A request's body as a parsed document: JSON or YAML, of bounded size, depth and time."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import pydantic
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request

from longshore.documents import MAX_BYTES, parse_json, parse_yaml, unplain
from longshore.gateway.problems import Problem

_READ_TIMEOUT_S = 30.0
_JSON = "application/json"
M = TypeVar("M", bound=pydantic.BaseModel)
_YAML = ("application/yaml", "application/x-yaml", "text/yaml")


async def read_document(request: Request) -> object:
    """Raises Problem: 400 (not JSON or YAML), 408 (too slow), 413 (too large), 415 (some other type)."""
    media_type = request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()
    if media_type not in (_JSON, *_YAML):
        raise Problem(415, f"send application/json or application/yaml, not {media_type}")
    text = await _read(request)
    # In a thread: a megabyte of YAML takes a while.
    name, parse = ("JSON", parse_json) if media_type == _JSON else ("YAML", parse_yaml)
    try:
        return await asyncio.to_thread(parse, text)
    except ValueError as error:
        raise Problem(400, f"the body is not a document in {name}: {error}") from None


async def read_model(request: Request, model: type[M]) -> M:
    """A body as a model; no body is an empty document. Raises Problem as `read_document`, RequestValidationError."""
    if request.headers.get("content-length") == "0" or not (
        "content-length" in request.headers or "transfer-encoding" in request.headers
    ):
        document: object = {}
    else:
        document = await read_document(request)
    if unplain(document):
        wrong = [
            {"loc": ("body", *fault.path.split(".")), "input": fault.value, "msg": fault.message}
            for fault in unplain(document)
        ]
        raise RequestValidationError(wrong)
    try:
        return model.model_validate(document)
    except pydantic.ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in faults]) from None


async def _read(request: Request) -> str:
    body = bytearray()
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise Problem(413, f"the body is larger than {MAX_BYTES} bytes")
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {_READ_TIMEOUT_S:.0f} s") from None
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        raise Problem(400, "the body is not UTF-8") from None
