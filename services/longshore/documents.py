"""A stranger's text as a document of plain values: YAML or JSON, of which neither can do more than JSON should.

Refused are a key that is there twice, YAML's aliases (a short text would stand for a document of any size), and
nesting deeper than any job's (the time that it takes to read grows with its square).
"""

from __future__ import annotations

import json
import math
from typing import Any

import yaml

from longshore.errors import Fault

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 64
_MAX_WHOLE_NUMBER = 2**63
# The one in C is ten times as fast, and most installations of PyYAML have it.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_json(text: str) -> object:
    """Raises ValueError with what is wrong, on one line."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def parse_yaml(text: str) -> object:
    """Raises ValueError with what is wrong, on one line."""
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader, with one check more
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(where + (error.problem or error.context or "malformed")) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def unplain(document: object) -> list[Fault]:
    """What of a document JSON cannot carry: YAML knows dates, sets and not-a-number, and both know half characters."""
    faults: list[Fault] = []
    # (path, value, depth)
    waiting: list[tuple[str, object, int]] = [("", document, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        parts: list[tuple[str, object]] = []
        wrong = _not_plain(value)
        if isinstance(value, dict):
            parts = [(str(key), part) for key, part in value.items() if isinstance(key, str)]
            faults += [Fault(_joined(path, str(key)), key, _BAD_KEY) for key in value if _not_plain_text(key)]
        elif isinstance(value, list):
            parts = [(str(index), part) for index, part in enumerate(value)]
        if parts and depth == MAX_DEPTH:
            wrong, parts = _TOO_DEEP, []
        if wrong:
            faults.append(Fault(path or "(document)", value, wrong))
        waiting += [(_joined(path, name), part, depth + 1) for name, part in reversed(parts)]
    return faults


_TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels"
_BAD_KEY = "a key must be a string; put it in quotes"


def _joined(path: str, name: str) -> str:
    name = name.encode("utf-8", "replace").decode("utf-8")
    return f"{path}.{name}" if path else name


def _not_plain(value: object) -> str | None:
    if isinstance(value, str):
        return "must be text without zero bytes and half characters" if _not_plain_text(value) else None
    if isinstance(value, float):
        return None if math.isfinite(value) else "must be a finite number"
    if isinstance(value, int):
        return None if abs(value) < _MAX_WHOLE_NUMBER else "is too large for a whole number"
    if value is None or isinstance(value, (dict, list)):
        return None
    return f"must be a plain JSON value, not a {type(value).__name__}; put it in quotes"


def _not_plain_text(value: object) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} is there twice")
        found[name] = value
    return found


def _check_events(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("uses YAML aliases; write the values out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)


class _Loader(_Base):  # type: ignore[misc]
    """Plain values, each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping
