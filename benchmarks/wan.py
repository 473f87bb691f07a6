"""A wide-area link for benchmarks: two network namespaces, joined by a TUN device each, with a delay and a rate.

The kernel's own traffic shaper (netem) is not built everywhere, so packets are held back here: each waits for the line
to be free at the given rate, then for the one-way delay. Needs root and /dev/net/tun.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import os
import random
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOME, SITE = "10.97.0.1", "10.97.0.2"
_NEW_NETWORK = 0x40000000
_SET_INTERFACE = 0x400454CA
_TUN_WITHOUT_HEADER = 0x1001
_LARGEST_PACKET = 65535
_BURST = 32
_START_S = 10.0


def unavailable() -> str:
    """Why no link can be made here; "" when one can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    made = subprocess.run(["ip", "netns", "add", "ls-bench-probe"], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", "ls-bench-probe"], capture_output=True, check=False)
    return "" if made.returncode == 0 else f"no network namespaces: {made.stderr.strip()[:80]}"


@dataclass(frozen=True)
class Link:
    """A running link. Commands started with `home` or `site` before them run at that end of it."""

    home: tuple[str, ...]
    site: tuple[str, ...]


@contextlib.contextmanager
def link(round_trip_ms: float, mbit: float, loss: float = 0.0) -> Iterator[Link]:
    """Makes both namespaces and carries their traffic until the end. Raises RuntimeError when that fails.

    Args:
        loss: share of packets that are dropped, each way.
    """
    names = [f"ls-bench-{end}-{os.getpid()}" for end in ("home", "site")]
    carrier: subprocess.Popen[str] | None = None
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        argv = [sys.executable, "-m", "benchmarks.wan", *names, str(round_trip_ms / 2000), str(mbit), str(loss)]
        carrier = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert carrier.stdout is not None
        if carrier.stdout.readline() != "up\n":
            raise RuntimeError("the link did not come up")
        yield Link(*(("ip", "netns", "exec", name) for name in names))
    finally:
        if carrier is not None:
            carrier.send_signal(signal.SIGTERM)
            carrier.wait(_START_S)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class _Lane:
    """Packets under way in one direction, in the order in which they leave the line."""

    def __init__(self, delay_s: float, bytes_per_s: float, loss: float) -> None:
        self._delay_s, self._bytes_per_s, self._loss = delay_s, bytes_per_s, loss
        # A router's buffer: one bandwidth-delay product of the round trip, and 200 ms at least.
        self._longest_queue_s = max(0.2, 2 * delay_s)
        self._free_at = 0.0
        self._packets: collections.deque[tuple[float, bytes]] = collections.deque()

    def put(self, packet: bytes, now: float) -> None:
        """Takes a packet, unless it is lost or the line's queue is full."""
        if self._loss and random.random() < self._loss:
            return
        begins = max(now, self._free_at)
        if begins - now <= self._longest_queue_s:
            self._free_at = begins + len(packet) / self._bytes_per_s
            self._packets.append((self._free_at + self._delay_s, packet))

    def due(self, now: float) -> Iterator[bytes]:
        while self._packets and self._packets[0][0] <= now:
            yield self._packets.popleft()[1]

    @property
    def next_at(self) -> float:
        return self._packets[0][0] if self._packets else float("inf")


def _open_tun(namespace: str, address: str) -> int:
    """A TUN device in a namespace, which this process need not be in."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/self/ns/net").open("rb") as ours, Path("/run/netns", namespace).open("rb") as theirs:
        if libc.setns(theirs.fileno(), _NEW_NETWORK) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        try:
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(device, _SET_INTERFACE, struct.pack("16sH22x", b"wan0", _TUN_WITHOUT_HEADER))
        finally:
            libc.setns(ours.fileno(), _NEW_NETWORK)
    for words in (f"addr add {address}/24 dev wan0", "link set wan0 up", "link set lo up"):
        subprocess.run(["ip", "-n", namespace, *words.split()], check=True)
    return device


def carry(home: str, site: str, delay_s: float, mbit: float, loss: float) -> None:
    """Carries packets both ways until SIGTERM."""
    devices = (_open_tun(home, HOME), _open_tun(site, SITE))
    lanes = tuple(_Lane(delay_s, mbit * 1e6 / 8, loss) for _ in devices)
    selector = selectors.DefaultSelector()
    for number, device in enumerate(devices):
        selector.register(device, selectors.EVENT_READ, number)
    print("up", flush=True)
    while True:
        wait = min(lane.next_at for lane in lanes) - time.monotonic()
        for key, _ in selector.select(max(0.0, min(wait, 1.0))):
            for _ in range(_BURST):
                try:
                    packet = os.read(devices[key.data], _LARGEST_PACKET)
                except BlockingIOError:
                    break
                lanes[key.data].put(packet, time.monotonic())
        now = time.monotonic()
        for number, lane in enumerate(lanes):
            for packet in lane.due(now):
                # A device whose buffer is full, or that is gone: a wide-area link loses packets.
                with contextlib.suppress(OSError):
                    os.write(devices[1 - number], packet)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    carry(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:6]))
