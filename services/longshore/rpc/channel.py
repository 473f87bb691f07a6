"""gRPC channels: where TLS is decided, in one place.

Plain text is for loopback and Unix sockets alone. Anything that leaves the machine needs LONGSHORE_TLS_CA, and, where
the peer asks who we are, LONGSHORE_TLS_CERT and LONGSHORE_TLS_KEY (PEM files).
"""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from longshore.errors import ConfigError

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# Of one message to a generator: a prompt of a million tokens has four.
MAX_ASK_BYTES = 16 * 1024 * 1024
# More than a wide link holds: 1 Gbit/s and 100 ms are 12 MB.
LOOKAHEAD_BYTES = 16 * 1024 * 1024

# Built-in retries: a peer that restarts is not its callers' problem. Calls still end at their deadline.
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # How much a stream may be sent before it is read. The default lets a far peer wait a round trip for every 64 KiB.
    ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config", _SERVICE_CONFIG),
]


@dataclass(frozen=True)
class ClientTls:
    """What one side of a connection shows and trusts, each PEM, where that is not the environment's."""

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)


def is_local(address: str) -> bool:
    """Whether an address can only be reached from this machine: a Unix socket or a loopback host."""
    if address.startswith("unix:"):
        return True
    host = address.rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tls_file(variable: str) -> bytes | None:
    """Content of the PEM file that a variable names; None when it is unset. Raises ConfigError if unreadable."""
    path = os.environ.get(variable)
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{variable} {path}: {error.strerror}") from None


def channel(address: str, *, name: str = "", retries: bool = True, tls: ClientTls | None = None) -> grpc.aio.Channel:
    """An asyncio channel to `address` ("host:port" or "unix:path").

    Args:
        name: host name that the peer's certificate must bear; empty: the address's own.
        retries: False for a caller that would rather go to another peer at once.
        tls: taken in place of what the environment says.

    Raises:
        ConfigError: the address is off this machine and no TLS authority is configured.
    """
    options = CHANNEL_OPTIONS if retries else [*CHANNEL_OPTIONS, ("grpc.enable_retries", 0)]
    shown = _from_environment() if tls is None else (tls.authority, tls.key, tls.certificate)
    if shown is not None and not address.startswith("unix:"):
        credentials = grpc.ssl_channel_credentials(*shown)
        named = [*options, ("grpc.ssl_target_name_override", name)] if name else options
        return grpc.aio.secure_channel(address, credentials, options=named)
    if not is_local(address):
        raise ConfigError(f"{address} is not on this machine: set LONGSHORE_TLS_CA (and _CERT, _KEY) to reach it")
    return grpc.aio.insecure_channel(address, options=options)


def _from_environment() -> tuple[bytes, bytes | None, bytes | None] | None:
    ca = tls_file("LONGSHORE_TLS_CA")
    return None if ca is None else (ca, tls_file("LONGSHORE_TLS_KEY"), tls_file("LONGSHORE_TLS_CERT"))
