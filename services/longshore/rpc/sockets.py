"""Sockets that are bound beside the launcher's reservation of their port (see launcher/ports.py)."""

from __future__ import annotations

import socket


def bind_shared(host: str, port: int) -> socket.socket:
    """A TCP socket bound with SO_REUSEPORT, not listening; port 0: any free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    # Accepted sockets inherit it; asyncio sets it only on those that were made for IPPROTO_TCP by name. Without it an
    # answer in two parts waits 40 ms for the other side's delayed acknowledgement.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
