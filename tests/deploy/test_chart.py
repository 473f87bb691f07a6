"""The Helm chart under every profile: Kubernetes takes what helm makes of it, and it is what it must be.

`make test-deploy`. Needs helm on the path and kubernetes-validate.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "longshore"
PROFILES = sorted((CHART / "ci").glob("*-values.yaml"))
# The newest and the oldest that kubernetes-validate knows at its pinned version.
VERSIONS = ["1.37", "1.25"]
# Kinds of others: there are no schemas of theirs in kubernetes-validate.
FOREIGN = {"Certificate", "ServiceMonitor", "PrometheusRule"}

if shutil.which("helm") is None:
    reason = "helm is not on the path"
    if os.environ.get("LONGSHORE_REQUIRE_ALL"):
        raise RuntimeError(reason)
    pytest.skip(reason, allow_module_level=True)


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["helm", *arguments], capture_output=True, text=True, timeout=60)


def render(*arguments: str) -> list[dict[str, Any]]:
    done = helm("template", "rel", str(CHART), "--namespace", "ns", *arguments)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def profile(path: Path) -> list[dict[str, Any]]:
    return render("--values", str(path), "--api-versions", "monitoring.coreos.com/v1")


def pods(documents: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for document in documents:
        if document["kind"] == "Pod":
            found.append((document["metadata"]["name"], document["spec"]))
        elif document["kind"] in ("Deployment", "StatefulSet"):
            found.append((document["metadata"]["name"], document["spec"]["template"]["spec"]))
    return found


def environment(container: dict[str, Any]) -> dict[str, Any]:
    # Of a name that stands twice Kubernetes takes the last.
    return {item["name"]: item.get("value") for item in container["env"]}


@pytest.mark.parametrize("values", PROFILES, ids=lambda path: path.stem)
def test_helm_finds_nothing_wrong(values: Path) -> None:
    done = helm("lint", "--strict", str(CHART), "--values", str(values))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", PROFILES, ids=lambda path: path.stem)
def test_kubernetes_takes_every_object(values: Path, version: str) -> None:
    import kubernetes_validate

    documents = profile(values)
    checked = [document for document in documents if document["kind"] not in FOREIGN]
    assert len(checked) >= 6
    for document in checked:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("values", PROFILES, ids=lambda path: path.stem)
def test_every_pod_keeps_to_the_restricted_standard(values: Path) -> None:
    found = pods(profile(values))
    assert len(found) >= 2
    for name, spec in found:
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert not any("hostPath" in volume for volume in spec["volumes"]), name
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] is True, name
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"], name


@pytest.mark.parametrize("values", PROFILES, ids=lambda path: path.stem)
def test_whatever_is_mounted_is_there_and_no_two_containers_share_a_port(values: Path) -> None:
    for name, spec in pods(profile(values)):
        ports = [port["containerPort"] for container in spec["containers"] for port in container.get("ports", ())]
        assert len(ports) == len(set(ports)), name
        claimed = {"data"}
        volumes = {volume["name"] for volume in spec["volumes"]} | claimed
        for container in spec["containers"]:
            mounts = container["volumeMounts"]
            assert {mount["name"] for mount in mounts} <= volumes, name
            paths = [mount["mountPath"] for mount in mounts]
            assert len(paths) == len(set(paths)), name
            # Where a process of ours writes, there is a volume.
            for variable in ("LONGSHORE_RUNS_DIR", "LONGSHORE_STATE_DIR", "LONGSHORE_SPOOL_DIR"):
                value = environment(container).get(variable) if "env" in container else None
                assert value is None or value in paths, f"{name}: {variable}"


def test_services_select_pods_that_have_their_ports() -> None:
    for values in PROFILES:
        documents = profile(values)
        templates = [
            document["spec"]["template"] for document in documents if document["kind"] in ("Deployment", "StatefulSet")
        ]
        for service in (document for document in documents if document["kind"] == "Service"):
            wanted = service["spec"]["selector"].items()
            chosen = [pod for pod in templates if wanted <= pod["metadata"]["labels"].items()]
            assert len(chosen) == 1, service["metadata"]["name"]
            names = {
                key
                for container in chosen[0]["spec"]["containers"]
                for port in container["ports"]
                for key in (port["name"], port["containerPort"])
            }
            for port in service["spec"]["ports"]:
                assert port.get("targetPort", port["port"]) in names, service["metadata"]["name"]


def test_a_secret_is_in_no_environment_and_no_argument() -> None:
    for values in PROFILES:
        for name, spec in pods(profile(values)):
            for container in spec["containers"]:
                for item in container.get("env", ()):
                    assert "secretKeyRef" not in item.get("valueFrom", {}), name
                    assert "@" not in str(item.get("value", "")), name


def test_a_rollout_site_refuses_what_it_cannot_work_with() -> None:
    good = ["--values", str(CHART / "ci" / "rollout-site-values.yaml")]
    for wrong, says in (
        ("tls.source=none", "a rollout site needs TLS"),
        ("site.jobConfigMap=", "site.jobConfigMap"),
        ("site.home.credentialSecret=", "site.home.credentialSecret"),
        ("site.name=home", "site.name"),
    ):
        done = helm("template", "rel", str(CHART), *good, "--set", wrong)
        assert done.returncode != 0, wrong
        assert says in done.stderr


def test_only_the_relay_knows_the_way_home() -> None:
    documents = profile(CHART / "ci" / "rollout-site-values.yaml")
    for name, spec in pods(documents):
        assert ("west-site" in yaml.safe_dump(spec)) == (name == "rel-longshore-relay"), name
    (relay,) = (spec for name, spec in pods(documents) if name == "rel-longshore-relay")
    file = environment(relay["containers"][0])["LONGSHORE_SITE_FILE"]
    (mount,) = (item for item in relay["containers"][0]["volumeMounts"] if file.startswith(item["mountPath"] + "/"))
    # As a folder: Kubernetes does not renew what is mounted by a subPath.
    assert "subPath" not in mount
    (volume,) = (item for item in relay["volumes"] if item["name"] == mount["name"])
    assert volume["secret"]["items"] == [{"key": "site.json", "path": Path(file).name}]
    assert volume["secret"]["defaultMode"] & 0o007 == 0


def test_a_home_that_takes_sites_listens_for_them_over_tls_alone() -> None:
    documents = profile(CHART / "ci" / "home-full-values.yaml")
    specs = dict(pods(documents))
    told = {item["name"]: environment(item) for item in specs["rel-longshore-home"]["containers"]}
    assert told["gateway"]["LONGSHORE_SITES_BROKER_URL"] == "rediss://broker.example.com:6380"
    assert told["gateway"]["LONGSHORE_SITES_FILE"] == told["weights"]["LONGSHORE_SITES_FILE"]
    (secret,) = (
        item for item in documents if item["metadata"]["name"] == "rel-longshore-broker" and "stringData" in item
    )
    conf = dict(line.split(" ", 1) for line in secret["stringData"]["broker.conf"].splitlines())
    assert conf["tls-port"] == "6380"
    mounts = {item["mountPath"] for item in specs["rel-longshore-broker"]["containers"][0]["volumeMounts"]}
    for name in ("tls-cert-file", "tls-key-file", "tls-ca-cert-file"):
        assert str(Path(conf[name]).parent) in mounts
    # Others reach the port that speaks TLS, and no other.
    outside = [item for item in documents if item["kind"] == "Service" and item["spec"].get("type") == "LoadBalancer"]
    assert {port["targetPort"] for item in outside for port in item["spec"]["ports"]} == {"weights", "redis-tls"}
    (certificate,) = (item for item in documents if item["kind"] == "Certificate")
    assert certificate["spec"]["uris"] == ["longshore:home"]
    assert "broker.example.com" in certificate["spec"]["dnsNames"]
    # By default nobody else is let in.
    default = render()
    assert "LONGSHORE_SITES" not in yaml.safe_dump_all(default)
    assert not [item for item in default if "6380" in yaml.safe_dump(item)]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("profile=house", "profile"),
        ("broker.kind=external", "broker.existingSecret"),
        ("weights.store.kind=s3", "weights.store.url"),
        ("workers.actr.places=1", "actr"),
        ("workers.actor.places=0", "places"),
        ("gateway.service.port=http", "port"),
        ("gateway.limits.jobs=0", "jobs"),
        ("gateway.oidc.jwksUrl=id.example.com", "jwksUrl"),
        ("sites.weights=weights.example.com:7443", "set all three"),
        ("sites.broker=rediss://broker.example.com", "broker"),
        ("sites.gateway=http://example.com", "gateway"),
    ],
)
def test_values_that_are_wrong_are_refused_by_name(wrong: str, says: str) -> None:
    done = helm("template", "rel", str(CHART), "--set", wrong)
    assert done.returncode != 0
    assert says in done.stderr


def test_the_default_home_starts_what_the_compose_file_starts() -> None:
    (home,) = (spec for name, spec in pods(render()) if name.endswith("-home"))
    started = {container["name"]: container["args"] for container in home["containers"]}
    assert started == {
        **{name: ["serve"] for name in ("gateway", "weights")},
        **{name: ["wait"] for name in ("learner", "generator", "verifier", "actor")},
    }
    compose = yaml.safe_load((CHART.parents[2] / "docker-compose.yml").read_text())["services"]
    for container in home["containers"]:
        ours = environment(container)
        theirs = compose[container["name"]]["environment"]
        # Kubernetes tells a container's name to it, and mounts an empty folder where there are no secrets.
        for variable in set(theirs) - {"LONGSHORE_PLACES"}:
            assert variable in ours, f"{container['name']}: {variable}"


def test_a_gateway_is_told_whose_tokens_and_how_much_it_takes() -> None:
    for values, expected in (
        ([], ("", "", "longshore", "", "")),
        (
            ["--values", str(CHART / "ci" / "home-full-values.yaml")],
            ("https://id.example.com/", "https://id.example.com/jwks", "longshore", "8", "0"),
        ),
    ):
        (home,) = (spec for name, spec in pods(render(*values)) if name.endswith("-home"))
        told = environment(home["containers"][0])
        names = ("OIDC_ISSUER", "OIDC_JWKS_URL", "OIDC_AUDIENCE", "MAX_JOBS", "MAX_GPUS")
        assert tuple(told[f"LONGSHORE_{name}"] for name in names) == expected


def test_task_files_are_mounted_where_a_gateway_lets_jobs_read() -> None:
    (home,) = (
        spec
        for name, spec in pods(render("--values", str(CHART / "ci" / "home-full-values.yaml")))
        if name.endswith("-home")
    )
    (claim,) = (volume["name"] for volume in home["volumes"] if volume.get("persistentVolumeClaim"))
    folder = environment(home["containers"][0])["LONGSHORE_DATA_DIR"]
    mounts = {
        container["name"]: mount
        for container in home["containers"]
        for mount in container["volumeMounts"]
        if mount["name"] == claim
    }
    assert set(mounts) == {"gateway", "learner"}
    assert all(mount["mountPath"] == folder and mount["readOnly"] for mount in mounts.values())


def test_the_other_kinds_are_as_their_operators_want_them() -> None:
    documents = {document["kind"]: document for document in profile(CHART / "ci" / "home-full-values.yaml")}
    certificate = documents["Certificate"]["spec"]
    assert {"server auth", "client auth"} == set(certificate["usages"])
    assert "weights.example.com" in certificate["dnsNames"]
    assert certificate["issuerRef"] == {"name": "ca", "kind": "ClusterIssuer", "group": "cert-manager.io"}
    assert all(endpoint["honorLabels"] for endpoint in documents["ServiceMonitor"]["spec"]["endpoints"])
    rules = documents["PrometheusRule"]["spec"]["groups"]
    assert any(rule["alert"] == "LongshoreLedgerImbalance" for group in rules for rule in group["rules"])
    without = {document["kind"] for document in render("--values", str(CHART / "ci" / "home-full-values.yaml"))}
    assert not without & {"ServiceMonitor", "PrometheusRule"}, "made where nobody knows the kind"


KUBERNETES = CHART / "ci" / "home-kubernetes-values.yaml"


def test_the_gateway_takes_the_file_of_clusters_that_the_chart_makes(tmp_path: Path) -> None:
    from longshore.launcher.kubernetes.cluster_settings import load_clusters

    (given,) = (found for found in profile(KUBERNETES) if found["metadata"]["name"] == "rel-longshore-clusters")
    path = tmp_path / "clusters.yaml"
    path.write_text(given["data"]["clusters.yaml"])
    settings = load_clusters(path)
    home = settings.home
    assert (home.namespace, home.release, home.tls_secret) == ("ns", "rel", "rel-longshore-tls")
    # With a claim that many nodes can mount the learner may run anywhere.
    assert not home.learner_beside_home
    assert settings.clusters["west"].home_weights == "weights.example.com:7443"
    documents = profile(KUBERNETES)
    services = {found["metadata"]["name"] for found in documents if found["kind"] == "Service"}
    assert home.weights.partition(".")[0] in services
    (workload,) = (
        found
        for found in documents
        if found["kind"] == "StatefulSet" and found["metadata"]["name"] == "rel-longshore-home"
    )
    assert home.owner is not None
    assert (home.owner.kind, home.owner.name) == (workload["kind"], workload["metadata"]["name"])
    assert home.home_claim == f"{workload['spec']['volumeClaimTemplates'][0]['metadata']['name']}-rel-longshore-home-0"


def test_the_launcher_may_do_what_it_does_in_its_namespace_and_the_gateway_alone_has_the_token() -> None:
    from longshore.launcher.kubernetes.cluster import _PLURALS

    documents = profile(KUBERNETES)
    (role,) = (found for found in documents if found["kind"] == "Role")
    may = {resource: rule["verbs"] for rule in role["rules"] for resource in rule["resources"]}
    for kind, plural in _PLURALS.items():
        wanted = {"get", "list"} if kind == "Pod" else {"get", "list", "create", "patch", "delete"}
        assert set(may[plural]) == wanted, kind
    assert set(may) == set(_PLURALS.values()) | {"pods/log"}
    assert not [found for found in documents if found["kind"].startswith("Cluster")]
    ((_, spec),) = ((name, spec) for name, spec in pods(documents) if name == "rel-longshore-home")
    having = {
        container["name"]
        for container in spec["containers"]
        if any(mount["name"] in ("account", "kubeconfigs") for mount in container["volumeMounts"])
    }
    assert {container["name"] for container in spec["containers"]} == {"gateway", "weights"}
    assert having == {"gateway"}


def test_the_launcher_wants_tls_whose_certificate_names_the_pods_of_jobs() -> None:
    done = helm("template", "rel", str(CHART), "--set", "launcher.kind=kubernetes")
    assert done.returncode != 0
    assert "pods of jobs reach each other over TLS" in done.stderr
    (secret,) = (found for found in profile(KUBERNETES) if found["metadata"]["name"] == "rel-longshore-tls")
    certificate = x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", "*.ns.svc", "rel-longshore-weights"} <= set(names.get_values_for_type(x509.DNSName))
    authority = x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["ca.crt"]))
    certificate.verify_directly_issued_by(authority)
