"""What the Kubernetes launcher makes of a job, against Kubernetes' own schemas and the restricted pod standard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kube import cluster_settings, works_in

from longshore.launcher.kubernetes.manifests import Around, manifests

VERSIONS = ["1.37", "1.25"]
EVERYTHING = {
    "serviceAccount": "jobs",
    "priorityClassName": "training",
    "imagePullSecrets": ["registry"],
    "objectStoreSecret": "bucket",
    "blobsUrl": "s3://bucket/blobs",
    "storage": {"size": "10Gi", "storageClass": "fast"},
    "gpu": {"nodeSelector": {"gpu": "h100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
    "services": {
        "verifier": {"runtimeClassName": "gvisor"},
        "generator": {
            "resources": {"requests": {"cpu": 2}, "limits": {"memory": "16Gi"}},
            "env": {"LONGSHORE_RESIDENTS": "3"},
        },
    },
}
OWNER = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "name": "x",
    "uid": "u",
    "controller": False,
    "blockOwnerDeletion": False,
}


def everything(folder: Path, **cluster: Any) -> list[dict[str, Any]]:
    settings = cluster_settings(home=cluster, west=cluster)
    works = works_in(
        folder,
        settings,
        sites=[{"name": "west", "actors": 2}],
        generator={"engine": "vllm", "tensor_parallel": 2} if "gpu" in cluster else {},
    )
    around = Around(frozenset({"policy/v1"}), owner=OWNER, anchor=OWNER)
    return [one for site, work in works.items() for one in manifests(work, settings.clusters[site], settings, around)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cluster", [{}, EVERYTHING], ids=["plain", "everything"])
def test_kubernetes_takes_every_object(tmp_path: Path, cluster: dict[str, Any], version: str) -> None:
    import kubernetes_validate

    found = everything(tmp_path, **cluster)
    assert len(found) >= 25
    for one in found:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("cluster", [{}, EVERYTHING], ids=["plain", "everything"])
def test_every_pod_keeps_to_the_restricted_standard(tmp_path: Path, cluster: dict[str, Any]) -> None:
    pods = [
        (one["metadata"]["name"], one["spec"]["template"]["spec"])
        for one in everything(tmp_path, **cluster)
        if "template" in one.get("spec", {})
    ]
    assert len(pods) == 9
    for name, spec in pods:
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert not any("hostPath" in volume for volume in spec["volumes"]), name
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] is True, name
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"], name
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), name
