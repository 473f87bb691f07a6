"""Runs the processes of the queue's benchmark and puts together what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import wan
from benchmarks.common_broker import PrivateBroker
from benchmarks.queue_load import Done, Order, prepare

ROOT = Path(__file__).resolve().parent.parent
_PORT = 5201
_END_S = 60.0
# Prints the bytes a second that came, from the first to the last.
_SERVE = """
import socket, sys, time
with socket.create_server(("0.0.0.0", int(sys.argv[1]))) as server:
    print("ready", flush=True)
    peer = server.accept()[0]
    began, size = time.monotonic(), 0
    while part := peer.recv(1 << 20):
        size += len(part)
    print(size / (time.monotonic() - began), flush=True)
"""
_PUSH = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as peer:
    end = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end:
        peer.sendall(bytes(65536))
"""


@dataclass(frozen=True)
class Run:
    """What one run measured; `seconds` from its first rollout sent to its last one acknowledged."""

    count: int
    seconds: float
    client_s: float
    broker_s: float
    # Issuing and claiming the tickets.
    tickets_s: float
    latencies: list[float]

    @property
    def rate(self) -> float:
        return self.count / self.seconds


async def run(server: PrivateBroker, orders: Sequence[tuple[Order, Sequence[str]]]) -> Run:
    """One run of these processes, each with what goes before its command. The broker is emptied first."""
    first = orders[0][0]
    issue_s = await prepare(server.url, first.count if first.ours else 0)
    processes = [_start([*prefix, *order.argv()]) for order, prefix in orders]
    try:
        for process in processes:
            _line(process)
        used = server.processor_s()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        done = [Done(**json.loads(_line(process))) for process in processes]
        return Run(
            first.count,
            max(item.ended for item in done) - min(item.began for item in done),
            sum(item.processor_s for item in done),
            server.processor_s() - used,
            issue_s + sum(item.claim_s for item in done),
            [value for item in done for value in item.latencies],
        )
    finally:
        for process in processes:
            _end(process)


def plain_transfer(link: wan.Link, seconds: float) -> float:
    """Bytes a second of one TCP connection from the site to home that sends as fast as it can."""
    server = _start([*link.home, sys.executable, "-c", _SERVE, str(_PORT)])
    try:
        _line(server)
        pusher = _start([*link.site, sys.executable, "-c", _PUSH, wan.HOME, str(_PORT), str(seconds)])
        try:
            return float(_line(server))
        finally:
            _end(pusher)
    finally:
        _end(server)


def _start(argv: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def _line(process: subprocess.Popen[str]) -> str:
    """Its next line. Raises RuntimeError when it ended instead; what it said of it is on our standard error."""
    assert process.stdout is not None
    if line := process.stdout.readline():
        return line
    raise RuntimeError(f"a process of the benchmark ended with status {process.wait(_END_S)}")


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.communicate(timeout=_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
