"""The /metrics and /healthz endpoints of every process.

Metric names are longshore_<service>_<what>_<unit>; labels are `project`, `job`, `site` and small closed sets. Each
process folder's `metrics.py` declares its own on the default registry of prometheus-client.
"""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import prometheus_client
import structlog

import longshore
from longshore.errors import ConfigError
from longshore.telemetry.health import HEALTH

log = structlog.get_logger()

BUILD_INFO = prometheus_client.Info("longshore_build", "Version of the package and the service that runs it")


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # The launcher holds our port with SO_REUSEPORT between restarts.
    allow_reuse_port = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """A scrape a few seconds is not news."""


def _pages() -> Callable[..., Iterable[bytes]]:
    metrics = prometheus_client.make_wsgi_app()

    def page(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/healthz":
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        status, text = ("200 OK", b"serving\n") if HEALTH.serves() else ("503 Service Unavailable", b"not serving\n")
        start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
        return [text]

    return page


class MetricsServer:
    """Serves the default registry, and whether the process serves, over HTTP from a thread of its own."""

    def __init__(self, listen: str, service: str) -> None:
        self.listen = listen
        BUILD_INFO.info({"version": longshore.__version__, "service": service})

    def start(self) -> None:
        """Binds and serves. Raises ConfigError when the address cannot be had."""
        host, _, port = self.listen.rpartition(":")
        try:
            self._server = make_server(host.strip("[]"), int(port), _pages(), _Server, handler_class=_Quiet)
        except (OSError, ValueError) as error:
            raise ConfigError(f"LONGSHORE_METRICS_LISTEN {self.listen}: {error}") from None
        self.address = f"{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
