"""The metrics of a worker's processes beside its own: one endpoint to scrape, however many processes come and go."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

# Within a scrape's 8 s (deploy/prometheus), for all of them together.
_TIMEOUT_S = 5.0
_AT_ONCE = 16
# A process exposes some tens of KiB; more than this is none of ours.
_MAX_BYTES = 8 * 1024 * 1024
# Of the worker itself there are such already, and a name may stand once.
_OWN = ("python_", "process_", "longshore_build")


class ChildMetrics(Collector):
    """Fetches each process's metrics when it is asked; they get the label `process`."""

    def __init__(self, addresses: Callable[[], dict[str, str]]) -> None:
        """
        Args:
            addresses: unit -> host:port of /metrics; called from the thread of the metrics server.
        """
        self._addresses = addresses

    def describe(self) -> Iterable[Metric]:
        """Nothing is known before it is asked for."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """A process that does not answer in time is left out: it may be starting, or ending."""
        addresses = self._addresses()
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            bodies = list(threads.map(_fetch, addresses.values()))
        merged: dict[str, Metric] = {}
        for unit, body in zip(addresses, bodies, strict=True):
            process = unit.rpartition("/")[2]
            for family in text_string_to_metric_families(body):
                if family.name.startswith(_OWN):
                    continue
                into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {**sample.labels, "process": process}
                    into.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)
        return merged.values()


def _fetch(address: str) -> str:
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as answer:
            body: bytes = answer.read(_MAX_BYTES)
    except OSError:
        return ""
    return body.decode("utf-8", "replace")
