"""Which launcher an address means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longshore.errors import ConfigError
from longshore.launcher.client import SupervisorClient
from longshore.launcher.fleet import Fleet

if TYPE_CHECKING:
    from longshore.launcher.kubernetes.launcher import KubernetesLauncher
    from longshore.launcher.kubernetes.scaler import Lag

WORKERS = "workers:"
KUBERNETES = "kubernetes:"


def connect_launcher(address: str, lag: Lag) -> SupervisorClient | Fleet | KubernetesLauncher:
    """`workers:FOLDER`: the workers whose sockets are in the folder; `kubernetes:FILE`: the clusters of that file; else
    the supervisor at that address.

    Args:
        lag: tickets of (job, project, site), by which Kubernetes is scaled.

    Raises:
        ConfigError: the file of the clusters is wrong, or Kubernetes' client is not installed.
    """
    if address.startswith(WORKERS):
        return Fleet(Path(address.removeprefix(WORKERS)), SupervisorClient)
    if address.startswith(KUBERNETES):
        return _kubernetes(Path(address.removeprefix(KUBERNETES)), lag)
    return SupervisorClient(address)


def _kubernetes(path: Path, lag: Lag) -> KubernetesLauncher:
    try:
        # Here alone: a gateway that has no clusters need not have their client.
        from longshore.launcher.kubernetes.cluster import connect
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"LONGSHORE_SUPERVISOR {KUBERNETES}{path} needs {error.name}: install longshore[kubernetes]"
        ) from None
    from longshore.launcher.kubernetes.cluster_settings import load_clusters
    from longshore.launcher.kubernetes.launcher import KubernetesLauncher

    return KubernetesLauncher(load_clusters(path), connect, lag)
