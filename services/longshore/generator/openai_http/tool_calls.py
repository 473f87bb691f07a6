"""Finds the calls of tools in a reply's text, while it grows.

A model writes calls as its chat template taught it to; two ways are known, and told apart by the template:

Hermes, Qwen, SmolLM 3:  <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>, any number of them, text around
Llama 3:                 {"name": "add", "parameters": {"a": 1}} and nothing else; several are joined by a semicolon

What looks like a call and cannot be read stays text: nothing that the model said is lost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Protocol

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
# Tokens that tokenizers may call special, and that say where a call is.
MARKS = (OPEN, CLOSE, PYTHON_TAG)


@dataclass(frozen=True)
class FoundCall:
    """One call. Example: FoundCall("add", '{"a": 1}')"""

    name: str
    # JSON text of an object.
    arguments: str


@dataclass(frozen=True)
class Found:
    """What is certain of a reply's next part."""

    text: str = ""
    calls: tuple[FoundCall, ...] = ()


class CallFinder(Protocol):
    """Takes a reply's text bit by bit."""

    def add(self, text: str) -> Found: ...

    def end(self) -> Found:
        """What was held back; the reply has ended."""


class NoCalls:
    """For replies in which no calls are looked for."""

    def add(self, text: str) -> Found:
        return Found(text)

    def end(self) -> Found:
        return Found()


class TaggedCalls:
    """Calls between <tool_call> and </tool_call>."""

    def __init__(self) -> None:
        self._inside = False
        self._held = ""

    def add(self, text: str) -> Found:
        self._held += text
        said = ""
        calls: list[FoundCall] = []
        while True:
            mark = CLOSE if self._inside else OPEN
            before, found, after = self._held.partition(mark)
            if not found:
                break
            self._held = after
            if self._inside:
                call = _read(before, "arguments")
                if call is None:
                    said += OPEN + before + CLOSE
                else:
                    calls.append(call)
            else:
                said += before
            self._inside = not self._inside
        if not self._inside:
            keep = _begun(self._held, OPEN)
            said += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        return Found(said, tuple(calls))

    def end(self) -> Found:
        held, inside = self._held, self._inside
        self._held, self._inside = "", False
        if not inside:
            return Found(held)
        # A model may end its turn in place of the closing tag.
        call = _read(held, "arguments")
        return Found(OPEN + held) if call is None else Found(calls=(call,))


class WholeReplyCalls:
    """A reply that is nothing but one call, or several joined by semicolons."""

    def __init__(self) -> None:
        self._held = ""
        # None until there is a first character to tell by.
        self._may_be: bool | None = None

    def add(self, text: str) -> Found:
        self._held += text
        if self._may_be is None:
            start = self._held.lstrip()
            if start and not PYTHON_TAG.startswith(start):
                self._may_be = start.startswith(("{", PYTHON_TAG))
        if self._may_be is not False:
            return Found()
        said, self._held = self._held, ""
        return Found(said)

    def end(self) -> Found:
        held, self._held = self._held, ""
        calls = _read_joined(held.strip().removeprefix(PYTHON_TAG))
        return Found(calls=tuple(calls)) if calls else Found(held)


def finder(template: str) -> CallFinder | None:
    """What finds the calls that a chat template teaches; None: it teaches none of the known ways."""
    if OPEN in template:
        return TaggedCalls()
    if PYTHON_TAG in template or '"parameters":' in template:
        return WholeReplyCalls()
    return None


def _read(text: str, arguments: str) -> FoundCall | None:
    try:
        return _call(json.loads(text, parse_constant=_refuse), arguments)
    except (ValueError, RecursionError):
        return None


def _read_joined(text: str) -> list[FoundCall] | None:
    """Calls joined by semicolons; None when the text is anything else."""
    decoder = json.JSONDecoder(parse_constant=_refuse)
    calls: list[FoundCall] = []
    rest = text.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        call = _call(value, "parameters")
        if call is None:
            return None
        calls.append(call)
        rest = rest[end:].lstrip()
        if rest and not rest.startswith(";"):
            return None
        rest = rest[1:].lstrip()
    return calls


def _call(value: object, arguments: str) -> FoundCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    given = value.get(arguments, {})
    if isinstance(given, str):
        # Some models write the arguments as JSON within JSON.
        try:
            given = json.loads(given, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
    if not isinstance(given, dict):
        return None
    return FoundCall(value["name"], json.dumps(given, ensure_ascii=False))


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _begun(text: str, mark: str) -> int:
    """Length of the longest end of the text that is the mark's beginning."""
    return next((length for length in range(len(mark) - 1, 0, -1) if text.endswith(mark[:length])), 0)
