"""Loopback ports that stay ours while the process that listens on them is down.

A reservation is a socket that is bound with SO_REUSEPORT and never listens: the kernel gives the port to nobody else
(neither to another bind nor as the source of a connection), delivers no connection to the holder, and lets a listener
of the same user bind beside it if that asks for SO_REUSEPORT too. gRPC, MetricsServer and the HTTP servers do.
"""

from __future__ import annotations

import re
import socket

from longshore.errors import ConfigError
from longshore.rpc.sockets import bind_shared

LOOPBACK = "127.0.0.1"
_PLACEHOLDER = re.compile(r"\$\{PORT:([A-Za-z0-9_.-]+)\}")


def check_free(port: int) -> None:
    """Raises ConfigError when something listens on the loopback port already, even with SO_REUSEPORT."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Without SO_REUSEPORT a bind beside a listener fails; SO_REUSEADDR forgives connections that linger.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise ConfigError(f"port {port} cannot be had: {error.strerror}; choose another with --port") from None


class PortReservations:
    """Named loopback ports, held from the first mention until `close`."""

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}

    def port(self, name: str) -> int:
        """The port of a name, the same one at every call."""
        if name not in self._held:
            self._held[name] = bind_shared(LOOPBACK, 0)
        return int(self._held[name].getsockname()[1])

    def fill(self, text: str) -> str:
        """Replaces each `${PORT:name}` by the port of that name."""
        return _PLACEHOLDER.sub(lambda match: str(self.port(match[1])), text)

    def close(self) -> None:
        """Gives every port back."""
        for held in self._held.values():
            held.close()
        self._held.clear()


def placeholder(name: str) -> str:
    """How a plan writes a port that the launcher shall choose."""
    return f"${{PORT:{name}}}"
