"""Where a site's generators are: what LONGSHORE_GENERATOR lists, read anew every few seconds. Knows no gRPC.

| entry          | stands for                                                                                      |
|----------------|-------------------------------------------------------------------------------------------------|
| `host:port`    | every address that the name has now: one for a machine, one a pod for a headless service       |
| `unix:PATH`    | a socket on this machine                                                                        |
| `file:PATH`    | the entries of a file, one a line, `#` begins a comment; a file that is not there lists none    |

A name that cannot be looked up keeps the addresses that it had: whether a generator is used is its health's to say.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import structlog

from longshore.errors import ConfigError

# More than these are not looked at: each costs a connection and two small loops.
MAX_GENERATORS = 1024
LOOKUP_S = 5.0
_MAX_FILE_BYTES = 64 * 1024
_VARIABLE = "LONGSHORE_GENERATOR"
_FORMS = "host:port, unix:PATH, file:PATH"

log = structlog.get_logger()

# The addresses that a host's name has. Raises OSError.
Lookup = Callable[[str], Awaitable[Iterable[str]]]


@dataclass(frozen=True, order=True)
class Address:
    """One generator's. Example: Address("10.0.0.7:7000", name="generators.default.svc")"""

    # What a channel is opened to.
    target: str
    # The name that its certificate has to bear; empty: the target's own.
    name: str = ""


def parse_entries(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated list. Raises ConfigError naming one that is none."""
    entries = tuple(entry.strip() for entry in text.split(",") if entry.strip())
    if not entries:
        raise ConfigError(
            f"{_VARIABLE} lists no generator: write host:port, unix:PATH or file:PATH, with commas between"
        )
    for entry in entries:
        _check(entry)
    return entries


def _check(entry: str) -> None:
    if entry.startswith(("unix:", "file:")):
        if len(entry) == 5:
            raise ConfigError(f"{_VARIABLE}: {entry!r} has no path")
        return
    host, _, port = entry.rpartition(":")
    bare = not host.startswith("[") and ":" in host
    if not host or bare or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(
            f"{_VARIABLE}: {entry!r} is not host:port, unix:PATH or file:PATH; an IPv6 host is [host]:port"
        )


async def look_up(host: str) -> list[str]:
    """The system's resolver. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(item[4][0]) for item in found]


class AddressBook:
    """What the entries stand for now."""

    def __init__(self, entries: Iterable[str], lookup: Lookup = look_up) -> None:
        self._entries = tuple(entries)
        self._lookup = lookup
        # Of each host: the addresses that it had when it was last looked up with success.
        self._known: dict[str, tuple[str, ...]] = {}
        self._told: set[str] = set()

    async def read(self) -> list[Address]:
        """Every generator's address, each once, in a fixed order; at most MAX_GENERATORS."""
        entries = list(self._entries)
        for entry in self._entries:
            if entry.startswith("file:"):
                entries += await asyncio.to_thread(self._read_file, entry)
        found: dict[str, Address] = {}
        for entry in dict.fromkeys(entries):
            for address in await self._stand_for(entry):
                found.setdefault(address.target, address)
        if len(found) > MAX_GENERATORS:
            self._tell("too many", f"{len(found)} generators are listed; only {MAX_GENERATORS} are used")
        return sorted(found.values())[:MAX_GENERATORS]

    async def _stand_for(self, entry: str) -> list[Address]:
        if entry.startswith("file:"):
            return []
        host, _, port = entry.rpartition(":")
        if entry.startswith("unix:") or _needs_no_lookup(host):
            return [Address(entry)]
        try:
            async with asyncio.timeout(LOOKUP_S):
                self._known[host] = tuple(await self._lookup(host))
            self._told.discard(host)
        except (OSError, TimeoutError) as error:
            kept = len(self._known.get(host, ()))
            self._tell(host, f"{host} cannot be looked up ({error!r}); its {kept} addresses stay")
        return [Address(_target(ip, port), host) for ip in self._known.get(host, ())]

    def _read_file(self, entry: str) -> list[str]:
        # A URL's path: a comma in it is written %2C.
        path = Path(unquote(entry.removeprefix("file:").removeprefix("//")))
        try:
            with path.open(encoding="utf-8") as file:
                lines = file.read(_MAX_FILE_BYTES).splitlines()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            self._tell(entry, f"{path} cannot be read: {error}")
            return []
        entries = []
        for line in lines:
            text = line.partition("#")[0].strip()
            try:
                if text and not text.startswith("file:"):
                    _check(text)
                    entries.append(text)
            except ConfigError as error:
                self._tell(text, f"{path}: {error}")
        return entries

    def _tell(self, about: str, text: str) -> None:
        """Once, not every few seconds."""
        if about not in self._told and len(self._told) < MAX_GENERATORS:
            self._told.add(about)
            log.warning("generators", reason=text)


def _needs_no_lookup(host: str) -> bool:
    # "localhost" has two addresses and one machine.
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _target(ip: str, port: str) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
