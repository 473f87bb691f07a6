"""One cluster's API over the official client: list, apply, delete, logs. Decides nothing, and knows no job.

Objects are plain values both ways. Every call has a deadline; a cluster that does not answer, or lets us do nothing,
is Unavailable, and what it will never take is Rejected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import aiohttp
import structlog
from kubernetes.aio import client as k8s
from kubernetes.aio import config as k8s_config

from longshore.errors import ConfigError, Rejected, Unavailable
from longshore.launcher.kubernetes.cluster_settings import ClusterSettings
from longshore.launcher.kubernetes.reconcile import REPLACED
from longshore.launcher.kubernetes.wanted import MANAGER, Manifest
from longshore.launcher.kubernetes.watcher import NoAnswer

log = structlog.get_logger()

CALL_S = 15.0
_DEADLINE = aiohttp.ClientTimeout(total=CALL_S)
_LIST_LIMIT = 500
_MAX_LIST = 20_000
_PLURALS = {
    "ConfigMap": "configmaps",
    "Deployment": "deployments",
    "Job": "jobs",
    "JobSet": "jobsets",
    "NetworkPolicy": "networkpolicies",
    "PersistentVolumeClaim": "persistentvolumeclaims",
    "Pod": "pods",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "ScaledObject": "scaledobjects",
    "Secret": "secrets",
    "Service": "services",
    "StatefulSet": "statefulsets",
    "TriggerAuthentication": "triggerauthentications",
}
_GONE, _CONFLICT, _UNAUTHORIZED = 404, 409, 401
_REFUSED = frozenset({400, 413, 422})
# Older API servers call it their own fault that an applied object can't be read.
_MISSHAPEN = re.compile(r"failed to (create typed patch|convert new) object")
_NAME = re.compile(r"^[A-Za-z0-9.-]+$")


class Cluster:
    """One namespace of one cluster. `open` may be called again after any Unavailable."""

    def __init__(self, name: str, settings: ClusterSettings) -> None:
        self.name = name
        self._settings = settings
        self._client: k8s.ApiClient | None = None

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def kinds(self) -> frozenset[str]:
        """API groups with their versions. Example: {"apps/v1", "policy/v1", "keda.sh/v1alpha1"}"""
        found = await self._call("GET", "/apis")
        return frozenset(version["groupVersion"] for group in found["groups"] for version in group["versions"])

    async def get(self, api_version: str, kind: str, name: str) -> Manifest | None:
        """One object; None when it is not there."""
        try:
            return await self._call("GET", f"{self._path(api_version, kind)}/{_checked(name)}")
        except _Missing:
            return None

    async def list(self, api_version: str, kind: str, labels: Mapping[str, str]) -> list[Manifest]:
        """Every object of a kind that has the labels; each with its kind. Raises Unavailable for too many."""
        query = {"labelSelector": ",".join(f"{name}={value}" for name, value in labels.items()), "limit": _LIST_LIMIT}
        found: list[Manifest] = []
        while True:
            page = await self._call("GET", self._path(api_version, kind), query)
            # A list leaves out what it is a list of.
            found += [{**item, "apiVersion": api_version, "kind": kind} for item in page["items"]]
            more = page["metadata"].get("continue")
            if not more:
                return found
            if len(found) > _MAX_LIST:
                raise Unavailable(f"cluster {self.name} has more than {_MAX_LIST} {_PLURALS[kind]} of ours")
            query["continue"] = more

    async def apply(self, manifest: Manifest) -> Manifest:
        """Server-side apply: makes an object or sets what the manifest says of it, and returns it as it then is."""
        path = f"{self._path(manifest['apiVersion'], manifest['kind'])}/{_checked(manifest['metadata']['name'])}"
        query = {"fieldManager": MANAGER, "force": "true"}
        return await self._call("PATCH", path, query, manifest, "application/apply-patch+yaml")

    async def delete(self, api_version: str, kind: str, name: str) -> None:
        """Has an object and what it owns go; what has gone already is no fault.

        What is made anew under its name stays until its pods have gone: there must not be two learners.
        """
        how = "Foreground" if kind in REPLACED else "Background"
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": how}
        try:
            await self._call("DELETE", f"{self._path(api_version, kind)}/{_checked(name)}", {}, body)
        except _Missing:
            return

    async def log(self, pod: str, since_s: int, limit_bytes: int) -> str:
        """What a pod wrote in the last `since_s` seconds, each line with its time in front; "" when it has gone."""
        query = {"sinceSeconds": since_s, "limitBytes": limit_bytes, "timestamps": "true"}
        try:
            return await self._text("GET", f"{self._path('v1', 'Pod')}/{_checked(pod)}/log", query)
        except (_Missing, Rejected):
            # A container that has not begun has no log, and is refused.
            return ""

    def _path(self, api_version: str, kind: str) -> str:
        root = "/api" if "/" not in api_version else "/apis"
        return f"{root}/{api_version}/namespaces/{self._settings.namespace}/{_PLURALS[kind]}"

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Manifest | None = None,
        content_type: str = "application/json",
    ) -> Manifest:
        text = await self._text(method, path, query, body, content_type)
        try:
            answer = json.loads(text)
        except ValueError:
            raise Unavailable(f"cluster {self.name} answers with what is no JSON") from None
        if not isinstance(answer, dict):
            raise Unavailable(f"cluster {self.name} answers with what is no object")
        return answer

    async def _text(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Manifest | None = None,
        content_type: str = "application/json",
    ) -> str:
        client = await self._open()
        try:
            serialized = await client.param_serialize(
                method,
                path,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json, */*", "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = await client.call_api(*serialized, _request_timeout=_DEADLINE)
            data: bytes = await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            await self.close()
            raise NoAnswer(f"cluster {self.name} does not answer: {error or type(error).__name__}") from None
        text = data.decode("utf-8", errors="replace")
        if answer.status >= 300:
            await self._raise(answer.status, method, path, _reason(text))
        return text

    async def _raise(self, status: int, method: str, path: str, reason: str) -> None:
        if status == _GONE:
            raise _Missing(reason)
        if status in _REFUSED or _MISSHAPEN.match(reason):
            raise Rejected("cluster", f"cluster {self.name} refuses {path.rpartition('/')[2]}: {reason}")
        if status == _UNAUTHORIZED:
            # A token that has run out: the next call reads the credentials anew.
            await self.close()
        raise Unavailable(f"cluster {self.name} answers {method} {path} with {status}: {reason}")

    async def _open(self) -> k8s.ApiClient:
        if self._client is None:
            configuration = k8s.Configuration()
            try:
                if self._settings.kubeconfig is None:
                    k8s_config.load_incluster_config(client_configuration=configuration)
                else:
                    await k8s_config.load_kube_config(
                        config_file=str(self._settings.kubeconfig),
                        context=self._settings.context or None,
                        client_configuration=configuration,
                        persist_config=False,
                    )
                self._client = k8s.ApiClient(configuration=configuration)
            except (k8s_config.ConfigException, OSError, ValueError) as error:
                # A secret may be mounted late, or be mended: it is read again at the next look.
                raise NoAnswer(f"cluster {self.name}: its credentials cannot be used: {error}") from None
        return self._client


class _Missing(Unavailable):
    """There is no such object."""


def connect(name: str, settings: ClusterSettings) -> Cluster:
    """Opens nothing yet. Raises ConfigError for a kubeconfig that is not there."""
    if settings.kubeconfig is not None and not settings.kubeconfig.is_file():
        raise ConfigError(f"clusters.{name}.kubeconfig {settings.kubeconfig}: there is no such file")
    return Cluster(name, settings)


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise Rejected("cluster", f"{name!r} is no name of an object")
    return name


def _reason(text: str) -> str:
    try:
        said = json.loads(text)
    except ValueError:
        return text[:300]
    return str(said.get("message") or text[:300]) if isinstance(said, dict) else text[:300]
