"""What a bare cluster on one machine lacks: a name service, and a way for pods to its API server on loopback.

    python tests/cluster/names.py KUBECONFIG ADDRESS     both on ADDRESS, which pods can reach, until it is stopped

Real clusters have both; then nothing of this is started. Names are those of Services, as CoreDNS answers them: of one
with an address of its own that address, of a headless one the addresses of the pods that are ready.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any
from urllib.parse import urlsplit

import yaml
from dnslib import QTYPE, RR, A
from dnslib.server import BaseResolver, DNSServer

SUFFIX = ".svc.cluster.local."


class Names(BaseResolver):
    """Reads Services and Endpoints anew every second."""

    def __init__(self, kubeconfig: Path) -> None:
        self._kubeconfig = kubeconfig
        self._table: dict[str, list[str]] = {}
        threading.Thread(target=self._follow, daemon=True).start()

    def resolve(self, request: Any, handler: Any) -> Any:
        reply = request.reply()
        name = str(request.q.qname).lower()
        found = self._table.get(name)
        if found is None:
            reply.header.rcode = 3
        elif request.q.qtype == QTYPE.A:
            for address in found:
                reply.add_answer(RR(name, QTYPE.A, rdata=A(address), ttl=1))
        return reply

    def _follow(self) -> None:
        while True:
            services = kubectl(self._kubeconfig, "get", "services,endpoints", "-A")
            if services is not None:
                self._table = table(services["items"])
            time.sleep(1.0)


def table(items: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Name -> addresses. Example: {"longshore-broker.ns.svc.cluster.local.": ["10.96.0.7"]}"""
    found: dict[str, list[str]] = {}
    for item in items:
        name = f"{item['metadata']['name']}.{item['metadata']['namespace']}{SUFFIX}"
        if item["kind"] == "Service" and item["spec"].get("clusterIP") not in (None, "None"):
            found[name] = [item["spec"]["clusterIP"]]
    for item in items:
        name = f"{item['metadata']['name']}.{item['metadata']['namespace']}{SUFFIX}"
        if item["kind"] == "Endpoints" and name not in found:
            found[name] = [one["ip"] for part in item.get("subsets", ()) for one in part.get("addresses", ())]
    return found


def kubectl(kubeconfig: Path, *arguments: str) -> dict[str, Any] | None:
    command = ["kubectl", "--kubeconfig", str(kubeconfig), *arguments, "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout) if done.returncode == 0 else None


class _Forward(BaseRequestHandler):
    """Bytes both ways between a pod and the API server."""

    target: tuple[str, int]

    def handle(self) -> None:
        with socket.create_connection(self.target) as far:
            self.server.connections += [far, self.request]  # type: ignore[attr-defined]
            back = threading.Thread(target=_copy, args=(far, self.request), daemon=True)
            back.start()
            _copy(self.request, far)
            back.join(5)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class _Server(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseRequestHandler]) -> None:
        super().__init__(address, handler)
        self.connections: list[socket.socket] = []


class Way:
    """A way to a server that can be closed and opened again."""

    def __init__(self, host: str, target: tuple[str, int], port: int = 0) -> None:
        self.port = port
        self._host = host
        self._handler: type[BaseRequestHandler] = type("Forward", (_Forward,), {"target": target})
        self.open()

    def open(self) -> None:
        self._server = _Server((self._host, self.port), self._handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Ends the connections that there are, too."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._server.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def api_server(kubeconfig: Path) -> tuple[str, int]:
    """Host and port of a kubeconfig's cluster."""
    parts = urlsplit(yaml.safe_load(kubeconfig.read_text())["clusters"][0]["cluster"]["server"])
    return str(parts.hostname), int(parts.port or 443)


def start(kubeconfig: Path, address: str) -> list[Any]:
    """Starts both in threads."""
    names = DNSServer(Names(kubeconfig), address=address, port=53)
    names.start_thread()
    target = api_server(kubeconfig)
    return [names, Way(address, target, target[1])]


if __name__ == "__main__":
    start(Path(sys.argv[1]), sys.argv[2])
    threading.Event().wait()
