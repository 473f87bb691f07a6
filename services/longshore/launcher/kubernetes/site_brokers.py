"""The brokers of a job's rollout sites, which are pods of those sites' clusters."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from longshore.errors import Rejected
from longshore.launcher.kubernetes.cluster_settings import KubernetesSettings
from longshore.launcher.kubernetes.wanted import site_broker_url
from longshore.launcher.plan import BrokerCommand
from longshore.launcher.state_dir import write_private


def cluster_brokers(
    unit: str, sites: Sequence[str], keys: Path, settings: KubernetesSettings
) -> dict[str, BrokerCommand]:
    """Where each is, with a password that is made once and kept in the folder `keys`, which exists.

    Raises:
        Rejected: a site has no cluster.
        OSError: the folder cannot be written.
    """
    found = {}
    for site in sites:
        if site not in settings.clusters:
            there = ", ".join(sorted(settings.clusters))
            raise Rejected("site", f"sites: no cluster is configured for {site}; there are {there}")
        url = site_broker_url(
            unit, site, settings.clusters[site].namespace, _password(keys / f"broker-{site}.password")
        )
        # Its command and files are the image's and the pod's.
        found[site] = BrokerCommand(("valkey-server",), url)
    return found


def _password(path: Path) -> str:
    if not path.exists():
        write_private(path, secrets.token_urlsafe(32))
    return path.read_text(encoding="utf-8").strip()
