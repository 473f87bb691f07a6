"""Which clusters there are and what pods in them get: one YAML file, LONGSHORE_SUPERVISOR=kubernetes:FILE.

A JobSpec says what to train and at which sites; where a site's pods run, on which nodes and with how much, is said
here. Keys are written as Kubernetes writes its own (`nodeSelector`), so that Helm values go through unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from longshore.config import HOME_SITE, NAME_PATTERN
from longshore.documents import MAX_BYTES, parse_yaml
from longshore.errors import ConfigError

Strings = dict[str, str]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi|E|Ei)?$")]
Quantities = dict[str, Quantity | int]
_LABEL = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
# What a job has pods of. A broker and a relay are those of rollout sites.
Service = Literal["actor", "broker", "generator", "learner", "relay", "verifier"]
_MEMORY: dict[Service, tuple[str, str, str]] = {
    "actor": ("250m", "512Mi", "2Gi"),
    "broker": ("500m", "1Gi", "4Gi"),
    "generator": ("1", "2Gi", "8Gi"),
    "learner": ("1", "2Gi", "8Gi"),
    "relay": ("500m", "1Gi", "8Gi"),
    "verifier": ("250m", "512Mi", "4Gi"),
}


class _Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class Resources(_Part):
    """As in a container. Example: {"requests": {"cpu": "1"}, "limits": {"memory": "8Gi"}}"""

    requests: Quantities = Field(default_factory=dict)
    limits: Quantities = Field(default_factory=dict)


class ScaleSettings(_Part):
    """Between how many pods a service moves with the tickets that wait; absent: as many as the JobSpec says."""

    min: int = Field(1, ge=1, le=1024)
    max: int = Field(ge=1, le=1024)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class ServiceSettings(_Part):
    """The pods of one service."""

    resources: Resources | None = Field(None, description="absent: modest ones, in default_resources")
    node_selector: Strings = Field(default_factory=dict)
    tolerations: tuple[dict[str, object], ...] = ()
    env: Strings = Field(default_factory=dict, description="settings laid over those of the plan")
    runtime_class_name: str = ""
    scale: ScaleSettings | None = None


class GpuSettings(_Part):
    """How pods get GPUs: generators of engine vllm as many as share a model, the learner one a process on cuda."""

    resource: str = Field("nvidia.com/gpu", min_length=1)
    image_suffix: str = Field("-gpu", description="put behind an image's name, before its tag")
    node_selector: Strings = Field(default_factory=dict)
    tolerations: tuple[dict[str, object], ...] = ()


class StorageSettings(_Part):
    """The volume of a site's broker, and of its relay's spool and weights."""

    size: Quantity = "20Gi"
    storage_class: str = ""


class OwnerSettings(_Part):
    """An object of the release: when it goes, so does all that the launcher has made."""

    api_version: str = "apps/v1"
    kind: str = "StatefulSet"
    name: str = Field(min_length=1)


class ClusterSettings(_Part):
    """One cluster, which is one site."""

    kubeconfig: Path | None = Field(None, description="absent: the account of the pod that the gateway runs in")
    context: str = Field("", description="of the kubeconfig; empty: its current one")
    namespace: str = Field(pattern=_LABEL)
    release: str = Field("longshore", pattern=_LABEL, description="told apart by it from others in the namespace")
    owner: OwnerSettings | None = None
    service_account: str = Field("default", min_length=1, description="of jobs' pods, which get no token of it")
    tls_secret: str = Field(
        min_length=1, description="secret with tls.crt for *.NAMESPACE.svc and localhost, tls.key, ca.crt"
    )
    priority_class_name: str = ""
    image_pull_secrets: tuple[str, ...] = ()
    network_policy: bool = True
    open_egress: tuple[Service, ...] = Field(
        ("learner", "relay"), description="services that may reach beyond the namespace: hubs, home, object stores"
    )
    gpu: GpuSettings | None = None
    services: dict[Service, ServiceSettings] = Field(default_factory=dict)
    object_store_secret: str = Field("", description="secret with the environment of an object store; empty: none")
    blobs_url: str = Field("", description="s3:// URL of large rollouts; empty: there are none")
    storage: StorageSettings | None = Field(None, description="of a rollout site; absent: it lives as long as its pods")
    data_claim: str = Field(
        "", description="claim of task files and models, which jobs name by paths below /var/lib/longshore/data"
    )
    # The home cluster alone.
    weights: str = Field("", description="host:port of the weight store, as pods reach it")
    home_claim: str = Field("", description="the home's volume claim; the learner mounts its job's folders of it")
    learner_beside_home: bool = Field(
        False, description="the learner runs on the node of the home's pod: for a claim that one node alone can mount"
    )
    # Rollout sites alone: what `longshore site join` wrote, or where home is.
    site_secret: str = Field("", description="secret with the key site.json")
    home_weights: str = Field("", description="host:port of the home's weight store, as this cluster reaches it")
    home_broker_secret: str = Field("", description="secret with the key longshore_home_broker_url")
    home_blobs_url: str = Field("", description="the home's blobsUrl, as this cluster reaches it")

    def of(self, service: Service) -> ServiceSettings:
        return self.services.get(service, _PLAIN)


class ImageSettings(_Part):
    """The service's name and the tag are put behind the prefix. Example: registry.example.com/longshore-actor:0.1.0"""

    prefix: str = Field("longshore", min_length=1)
    tag: str = Field(min_length=1)
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    broker: str = Field("valkey/valkey:8.1", min_length=1)


class KubernetesSettings(_Part):
    """The whole file. A site's cluster has the site's name."""

    image: ImageSettings
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    clusters: dict[Annotated[str, Field(pattern=NAME_PATTERN)], ClusterSettings]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if HOME_SITE not in self.clusters:
            raise ValueError(f"clusters: one must be named {HOME_SITE}")
        for name, cluster in self.clusters.items():
            needed = ("weights", "home_claim") if name == HOME_SITE else ("home_weights", "home_broker_secret")
            if name != HOME_SITE and cluster.site_secret:
                continue
            missing = [to_camel(field) for field in needed if not getattr(cluster, field)]
            if missing:
                instead = "" if name == HOME_SITE else ", or siteSecret in their place"
                raise ValueError(f"clusters.{name}: set {' and '.join(missing)}{instead}")
        return self

    @property
    def home(self) -> ClusterSettings:
        return self.clusters[HOME_SITE]


_PLAIN = ServiceSettings()


def default_resources(service: Service) -> Resources:
    """What a pod of a service gets when nothing is said."""
    cpu, memory, most = _MEMORY[service]
    return Resources(requests={"cpu": cpu, "memory": memory}, limits={"memory": most})


def load_clusters(path: Path) -> KubernetesSettings:
    """Reads the file. Raises ConfigError naming every fault."""
    where = f"the file of the clusters {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{where} is larger than {MAX_BYTES} bytes")
    try:
        return KubernetesSettings.model_validate(parse_yaml(data.decode("utf-8-sig")))
    except pydantic.ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or '(file)'}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(faults)}") from None
    except ValueError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from None
