"""What a job becomes in a cluster. tests/deploy/test_job_manifests.py holds it to Kubernetes' own schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kube import cluster_settings, works_in

from longshore.errors import ConfigError, Rejected
from longshore.launcher.kubernetes.cluster_settings import load_clusters
from longshore.launcher.kubernetes.manifests import Around, manifests
from longshore.launcher.kubernetes.wanted import Manifest

TWO_SITES: dict[str, Any] = {"sites": [{"name": "west", "actors": 3}], "resources": {"actors": 2, "generators": 2}}
HOME_TEXT = "image: {tag: a}\nclusters:\n  home: {namespace: a, tlsSecret: b, weights: 'w:1', homeClaim: c}\n"
NOTHING_AROUND = Around()
ANCHOR = {"apiVersion": "v1", "kind": "ConfigMap", "name": "ls-j-1", "uid": "u"}


def made(
    folder: Path, site: str = "home", around: Around = NOTHING_AROUND, **clusters: Any
) -> dict[tuple[str, str], Manifest]:
    settings = cluster_settings(**clusters)
    work = works_in(folder, settings, **TWO_SITES)[site]
    found = manifests(work, settings.clusters[site], settings, around)
    assert len({(one["kind"], one["metadata"]["name"]) for one in found}) == len(found)
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def pod_of(found: dict[tuple[str, str], Manifest], service: str) -> Manifest:
    (workload,) = (
        one
        for (kind, name), one in found.items()
        if kind in ("Deployment", "StatefulSet", "Job") and name.endswith(f"-{service}")
    )
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def told(pod: Manifest) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in pod["containers"][0]["env"]}


def test_home_has_the_learner_and_what_makes_rollouts(tmp_path: Path) -> None:
    found = made(tmp_path)
    workloads = {
        (kind, name): one["spec"].get("replicas")
        for (kind, name), one in found.items()
        if "template" in one.get("spec", {})
    }
    assert workloads == {
        ("Job", "ls-j-1-learner"): None,
        ("Deployment", "ls-j-1-generator"): 2,
        ("Deployment", "ls-j-1-verifier"): 1,
        ("Deployment", "ls-j-1-actor"): 2,
    }
    budgets = {name for kind, name in found if kind == "PodDisruptionBudget"}
    assert budgets == {"ls-j-1-generator", "ls-j-1-actor"}
    assert next(iter(found)) == ("ConfigMap", "ls-j-1")


def test_peers_know_each_other_by_their_services(tmp_path: Path) -> None:
    found = made(tmp_path)
    actor = told(pod_of(found, "actor"))
    assert actor["LONGSHORE_GENERATOR"] == "ls-j-1-generator.longshore.svc:7443"
    assert actor["LONGSHORE_VERIFIER"] == "ls-j-1-verifier.longshore.svc:7443"
    assert actor["LONGSHORE_WEIGHTS"] == "longshore-weights.longshore.svc:7443"
    for service in ("generator", "verifier"):
        spec = found["Service", f"ls-j-1-{service}"]["spec"]
        labels = found["Deployment", f"ls-j-1-{service}"]["spec"]["template"]["metadata"]["labels"]
        assert spec["selector"].items() <= labels.items()
        assert {"name": "grpc", "port": 7443, "protocol": "TCP"} in spec["ports"]
    # Nothing of one machine is left.
    for service in ("learner", "generator", "verifier", "actor"):
        text = str(told(pod_of(found, service)))
        assert "127.0.0.1" not in text
        assert "PORT:" not in text


def test_a_rollout_site_has_a_broker_and_a_relay_which_alone_knows_the_way_home(tmp_path: Path) -> None:
    found = made(tmp_path, "west")
    kinds = {name.rpartition("-")[2]: kind for kind, name in found if kind in ("Deployment", "StatefulSet", "Job")}
    assert kinds == {
        **dict.fromkeys(("broker", "relay"), "StatefulSet"),
        **dict.fromkeys(("generator", "verifier", "actor"), "Deployment"),
    }
    for service in ("broker", "relay", "generator", "verifier", "actor"):
        text = str(pod_of(found, service))
        assert ("weights.example.com:7443" in text) == (service == "relay"), service
        assert ("home-broker" in text) == (service == "relay"), service
        assert "longshore-broker" not in text
        assert "longshore-weights" not in text
    (name,) = (name for kind, name in found if kind == "Secret")
    secret = found["Secret", name]["stringData"]
    assert secret["longshore_broker_url"].endswith(f"@{name}-broker.rollouts.svc:6379/0")
    assert f"requirepass {secret['broker_password']}\n" in secret["broker.conf"]
    assert "secret" not in secret["longshore_broker_url"]


def test_a_site_that_has_joined_shows_its_credential(tmp_path: Path) -> None:
    joined = {"siteSecret": "west-site", "homeWeights": "", "homeBrokerSecret": ""}
    found = made(tmp_path, "west", west=joined)
    for service in ("broker", "relay", "generator", "verifier", "actor"):
        assert ("west-site" in str(pod_of(found, service))) == (service == "relay"), service
    relay = told(pod_of(found, "relay"))
    assert relay["LONGSHORE_SITE_FILE"] == "/run/secrets/site/site.json"
    # The file says where home is.
    assert "LONGSHORE_HOME_WEIGHTS" not in relay
    assert "longshore_home_broker_url" not in str(pod_of(found, "relay"))


def test_large_rollouts_lie_where_each_site_says(tmp_path: Path) -> None:
    blobs = {"blobsUrl": "s3://west/blobs/", "homeBlobsUrl": "s3://home/blobs"}
    found = made(tmp_path, "west", west=blobs, home={"blobsUrl": "s3://home/blobs"})
    relay = told(pod_of(found, "relay"))
    assert relay["LONGSHORE_BLOBS_URL"] == "s3://west/blobs/j-1"
    assert relay["LONGSHORE_HOME_BLOBS_URL"] == "s3://home/blobs/j-1"
    home = made(tmp_path, home={"blobsUrl": "s3://home/blobs"})
    assert {told(pod_of(home, service))["LONGSHORE_BLOBS_URL"] for service in ("actor", "learner")} == {
        "s3://home/blobs/j-1"
    }
    # A pod has no other's disk.
    assert told(pod_of(made(tmp_path), "actor"))["LONGSHORE_BLOBS_URL"] == ""


def test_no_secret_is_in_an_environment_and_a_service_sees_what_it_needs(tmp_path: Path) -> None:
    found = made(tmp_path)
    sees = {}
    for service in ("learner", "generator", "verifier", "actor"):
        pod = pod_of(found, service)
        assert "secret@" not in str(pod)
        (volume,) = (one for one in pod["volumes"] if one["name"] == "secrets")
        sources = volume.get("projected", {}).get("sources", [])
        sees[service] = [item["key"] for source in sources for item in source["secret"]["items"]]
    assert sees == {
        "learner": ["longshore_broker_url"],
        "actor": ["longshore_broker_url"],
        "generator": ["openai.keys"],
        "verifier": [],
    }


def test_the_learner_mounts_the_folders_of_its_own_job_alone(tmp_path: Path) -> None:
    pod = pod_of(made(tmp_path), "learner")
    mounts = {
        mount["subPath"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if "subPath" in mount
    }
    environment = told(pod)
    assert mounts == {
        "runs/j-1": environment["LONGSHORE_RUN_DIR"],
        "state/jobs/j-1": str(Path(environment["LONGSHORE_SIGNING_KEY_FILE"]).parent),
    }


def test_everything_belongs_to_the_anchor_and_bears_the_labels(tmp_path: Path) -> None:
    owner = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "longshore-home", "uid": "o"}
    found = made(tmp_path, around=Around(owner=owner, anchor=ANCHOR))
    for (kind, name), one in found.items():
        assert one["metadata"]["ownerReferences"] == [owner if (kind, name) == ("ConfigMap", "ls-j-1") else ANCHOR]
        assert one["metadata"]["labels"]["longshore.dev/job"] == "j-1"
        assert one["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "longshore-gateway"
        assert one["metadata"]["namespace"] == "longshore"


def test_a_hash_changes_with_what_is_made_and_with_nothing_else(tmp_path: Path) -> None:
    def hashes(**settings: Any) -> dict[tuple[str, str], str]:
        return {
            key: one["metadata"]["annotations"]["longshore.dev/spec-hash"]
            for key, one in made(tmp_path, **settings).items()
        }

    before = hashes()
    assert hashes() == before
    after = hashes(home={"services": {"actor": {"env": {"LONGSHORE_SPOOL_MB": "256"}}}})
    assert {key for key in before if before[key] != after[key]} == {("Deployment", "ls-j-1-actor")}


def test_gpus_are_asked_for_where_the_job_needs_them(tmp_path: Path) -> None:
    gpu = {"gpu": {"nodeSelector": {"gpu": "h100"}, "tolerations": [{"key": "gpu"}]}}
    settings = cluster_settings(home=gpu)
    train = {"steps": 3, "compute": {"device": "cuda"}, "processes": 4}
    job = {"train": train, "generator": {"engine": "vllm", "tensor_parallel": 2}}
    work = works_in(tmp_path, settings, **job)["home"]
    found = {(one["kind"], one["metadata"]["name"]): one for one in manifests(work, settings.home, settings, Around())}
    for service, count in (("learner", 4), ("generator", 2)):
        pod = pod_of(found, service)
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == count
        assert pod["containers"][0]["image"] == f"longshore-{service}-gpu:1"
        assert pod["nodeSelector"] == {"gpu": "h100"}
        places = [one["mountPath"] for one in pod["containers"][0]["volumeMounts"]]
        assert places.count("/dev/shm") == 1
        assert len(set(places)) == len(places), "Kubernetes refuses two mounts at one place"
        assert [one["emptyDir"]["medium"] for one in pod["volumes"] if one["name"] == "memory"] == ["Memory"]
    assert "nvidia.com/gpu" not in str(pod_of(found, "actor"))
    assert "/dev/shm" not in str(pod_of(found, "actor"))
    plain = cluster_settings()
    with pytest.raises(Rejected, match=r"clusters\.home\.gpu"):
        manifests(works_in(tmp_path, plain, **job)["home"], plain.home, plain, Around())


def test_a_verifier_reaches_the_name_service_alone(tmp_path: Path) -> None:
    found = made(tmp_path)
    policy = found["NetworkPolicy", "ls-j-1-verifier"]["spec"]
    assert policy["egress"] == [{"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}]
    assert found["NetworkPolicy", "ls-j-1-in"]["spec"]["policyTypes"] == ["Ingress"]
    (choice,) = found["NetworkPolicy", "ls-j-1-out"]["spec"]["podSelector"]["matchExpressions"]
    assert set(choice["values"]) == {"generator", "actor"}


def test_keda_and_jobsets_are_used_where_they_are(tmp_path: Path) -> None:
    kinds = frozenset({"keda.sh/v1alpha1", "jobset.x-k8s.io/v1alpha2", "policy/v1"})
    scale = {"services": {"actor": {"scale": {"min": 1, "max": 6}}}}
    found = made(tmp_path, around=Around(kinds=kinds), home=scale)
    scaled = found["ScaledObject", "ls-j-1-actor"]["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (1, 6)
    assert scaled["triggers"][0]["metadata"]["stream"] == "ls:{default/j-1}:home:tickets"
    assert "secret" not in str(scaled["triggers"])
    # Whose number KEDA sets, we don't.
    assert "replicas" not in found["Deployment", "ls-j-1-actor"]["spec"]
    assert found["Deployment", "ls-j-1-generator"]["spec"]["replicas"] == 2
    assert ("JobSet", "ls-j-1-learner") in found
    assert ("Job", "ls-j-1-learner") not in found
    assert not {"ScaledObject", "JobSet"} & {kind for kind, _ in made(tmp_path, home=scale)}


def test_names_fit_whatever_a_job_is_called(tmp_path: Path) -> None:
    settings = cluster_settings()
    unit = "9" + "x" * 39 + "-abcdef"
    from kube import plan_in

    from longshore.launcher.kubernetes.wanted import JobTexts, site_work
    from longshore.settings import JobFile

    specs = plan_in(tmp_path, settings, unit=unit, **TWO_SITES)
    file = JobFile.model_validate_json((tmp_path / "runs" / unit / "job.json").read_text())
    for site, work in site_work(unit, "default", file.spec, JobTexts("", ""), specs).items():
        for one in manifests(work, settings.clusters[site], settings, Around()):
            assert len(one["metadata"]["name"]) <= 63
            assert one["metadata"]["name"][0].isalpha()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("clusters: {}\n", "image"),
        ("image: {tag: a}\nclusters: {west: {namespace: a, tlsSecret: b}}\n", "one must be named home"),
        ("image: {tag: a}\nclusters: {home: {namespace: a, tlsSecret: b}}\n", "set weights and homeClaim"),
        ("image: {tag: a}\nclusters: {home: {namespce: a}}\n", "clusters.home.namespce"),
        ("image: {tag: a}\nclusters: {home: {services: {actr: {}}}}\n", "actr"),
        (f"{HOME_TEXT}  west: {{namespace: a, tlsSecret: b}}\n", "homeBrokerSecret, or siteSecret in their place"),
        ("[", "is not YAML"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "clusters.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_clusters(path)
