"""The sites of a job and how they are: their processes, as the launcher tells them, and their tickets. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from longshore.api_types import ProcessView, SiteView
from longshore.config import HOME_SITE
from longshore.launcher.spec import ProcessState, ProcessStatus


def site_views(
    names: Sequence[str], processes: Sequence[ProcessStatus], tickets: Mapping[str, dict[str, int]]
) -> list[SiteView]:
    """The home site, then those of the job's spec. A rollout site's processes bear its name: `west-actor-0`."""
    own: dict[str, list[ProcessStatus]] = {name: [] for name in (HOME_SITE, *names)}
    # The longest name first: `west-2-actor-0` is of site west-2, not of west.
    ordered = sorted(names, key=len, reverse=True)
    for process in processes:
        own[next((name for name in ordered if process.name.startswith(f"{name}-")), HOME_SITE)].append(process)
    return [
        {
            "name": name,
            "healthy": all(item.state is ProcessState.READY for item in items) if items else None,
            "processes": [_view(item) for item in items],
            "tickets": tickets.get(name, {}),
        }
        for name, items in own.items()
    ]


def _view(process: ProcessStatus) -> ProcessView:
    return {
        "name": process.name,
        "state": process.state.value,
        "restarts": process.restarts,
        "exit_code": process.exit_code,
    }
