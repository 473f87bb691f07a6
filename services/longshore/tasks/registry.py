"""Plug-ins: task sources, environments and verifiers, by entry point.

A JobSpec names what is installed; it can never name a module, so that a job submitted over REST runs no code of its
own choosing.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from longshore.errors import PluginError

SOURCES = "longshore.task_sources"
ENVIRONMENTS = "longshore.environments"
VERIFIERS = "longshore.verifiers"

_WHAT = {SOURCES: "task source", ENVIRONMENTS: "environment", VERIFIERS: "verifier"}


def names(group: str) -> list[str]:
    """Installed names of a group, sorted."""
    return sorted({point.name for point in entry_points(group=group)})


def load(group: str, name: str) -> type[Any]:
    """The class behind an entry point.

    Raises:
        PluginError: the name is not installed (the text lists what is), is installed twice, or fails to import.
    """
    point = _find(group, name)
    try:
        loaded = point.load()
    except Exception as error:
        # Importing a plug-in runs code that we did not write.
        raise PluginError(f"{_WHAT[group]} {name!r} ({point.value}) failed to load: {error!r}") from error
    if not isinstance(loaded, type):
        raise PluginError(f"{_WHAT[group]} {name!r} ({point.value}) must be a class")
    return loaded


@functools.cache
def _find(group: str, name: str) -> EntryPoint:
    found = {point.value: point for point in entry_points(group=group, name=name)}
    if not found:
        installed = ", ".join(names(group)) or "none"
        raise PluginError(f"{_WHAT[group]} {name!r} is not installed; installed: {installed}")
    if len(found) > 1:
        # Otherwise a package could quietly take the place of a built-in verifier.
        raise PluginError(f"{_WHAT[group]} {name!r} is installed more than once: {', '.join(sorted(found))}")
    return next(iter(found.values()))
