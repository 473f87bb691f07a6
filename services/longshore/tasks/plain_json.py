"""Python values as JSON and back, exactly: tuples, sets and mappings with other keys than strings survive.

Plain JSON would turn them into lists and strings, and some of reasoning-gym's scorers notice.
"""

from __future__ import annotations

import numbers

_TAG = "__python__"


def encode(value: object) -> object:
    """A JSON-compatible stand-in. Raises TypeError for what has none."""
    if value is None or isinstance(value, bool):
        return value
    # Subclasses, numpy's among them, become the plain type.
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {_TAG: "tuple", "items": [encode(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {_TAG: "set", "items": [encode(item) for item in sorted(value, key=repr)]}
    if isinstance(value, dict):
        if _TAG not in value and all(type(key) is str for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {_TAG: "dict", "items": [[encode(key), encode(item)] for key, item in value.items()]}
    raise TypeError(f"a value of type {type(value).__name__} cannot travel as JSON")


def decode(value: object) -> object:
    """What `encode` was given. Raises ValueError for what it cannot have made."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: decode(item) for key, item in value.items()}
    items = decode(value.get("items"))
    try:
        if value[_TAG] == "tuple" and isinstance(items, list):
            return tuple(items)
        if value[_TAG] == "set" and isinstance(items, list):
            return set(items)
        if value[_TAG] == "dict" and isinstance(items, list):
            return dict(items)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"not an encoded {value[_TAG]!r}")
