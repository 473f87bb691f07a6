"""What dashboards and alarms ask for exists: each metric by the name under which a process exposes it."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import prometheus_client
import pytest
import yaml

ROOT = Path(__file__).parents[3]
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
NAME = re.compile(r"\blongshore_[a-z0-9_]+")


def exposed() -> set[str]:
    """Sample names of every process."""
    services = ROOT / "services"
    for path in services.glob("longshore/**/*metrics.py"):
        importlib.import_module(".".join(path.relative_to(services).with_suffix("").parts))
    return set(prometheus_client.REGISTRY._names_to_collectors)


def queries(dashboard: dict[str, object]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]


def test_every_metric_of_a_dashboard_is_exposed_by_some_process() -> None:
    known = exposed()
    assert DASHBOARDS
    for path in DASHBOARDS:
        asked = [name for query in queries(json.loads(path.read_text())) for name in NAME.findall(query)]
        assert len(asked) > 20
        assert not set(asked) - known, path.name


def test_every_metric_of_an_alarm_is_exposed_by_some_process() -> None:
    known = exposed()
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    alarms = [rule for group in rules["groups"] for rule in group["rules"]]
    asked = {name for rule in alarms for name in NAME.findall(rule["expr"])}
    assert len(asked) >= 9
    assert not asked - known


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_no_two_panels_of_a_dashboard_share_an_id_or_a_place(path: Path) -> None:
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_prometheus_finds_each_service_of_the_compose_file() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (scrape,) = (job for job in config["scrape_configs"] if job["job_name"] == "longshore")
    named = set(scrape["dns_sd_configs"][0]["names"])
    ours = {
        name
        for name, service in compose["services"].items()
        if (service.get("environment") or {}).get("LONGSHORE_METRICS_LISTEN")
    }
    assert named == ours
