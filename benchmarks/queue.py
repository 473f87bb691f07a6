"""The rollout queue: its rate and latency beside bare redis-py, and its use of a wide-area link.

    python benchmarks/queue.py [--quick] [--json FILE]

Rate: one process sends 16 KiB rollouts, reads and acknowledges them, over a Unix socket, to a private broker with
appendfsync everysec. Ours delivers claimed tickets (ids, dedupe by digest, leases closed, counts), reads, verifies and
acknowledges (the entry is deleted, the ticket ends). Bare does XADD, XREADGROUP and XACK of the same bytes in the same
batches of 64, two batches in flight, with the same client class and its settings; its stream is never trimmed. Issuing
and claiming tickets has no counterpart there: it is done before the clock starts, and timed in a row of its own.

Latency: a sender and a receiver process at half of our rate, from the moment that a rollout is due to the moment that
the receiver has it; rounds of two seconds, bare and ours in turn. Wide-area link: sender and receiver on both sides of
a link; rollouts' own bytes a second, beside a plain TCP transfer over the same link.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, queue_runs, wan
from benchmarks.common_broker import PrivateBroker
from benchmarks.queue_load import Order

RATE_GOAL, LATENCY_GOAL_MS, LINE_GOAL = 0.6, 10.0, 0.85
ROUND_TRIP_MS, MBIT = 100.0, 100.0
SIZE = 16 * 1024


async def measure(report: common.Report, args: argparse.Namespace) -> None:
    with PrivateBroker() as server:
        ours_rate = await measure_rate(report, server, args)
        await measure_latency(report, server, ours_rate / 2, args)
        measure_raw(report, server, args)
    await measure_link(report, args)


async def measure_rate(report: common.Report, server: PrivateBroker, args: argparse.Namespace) -> float:
    """Alternates both, so that what disturbs the machine disturbs both; returns our rate."""
    count, rounds = (3_000, 3) if args.quick else (16_000, 5)
    report.note(f"rate: {rounds} rounds of {count} rollouts, bare and ours in turn")
    runs: dict[bool, list[queue_runs.Run]] = {False: [], True: []}
    for _ in range(rounds):
        for ours in (False, True):
            order = Order("both", ours, server.url, count, size=SIZE)
            runs[ours].append(await queue_runs.run(server, [(order, ())]))
    bare, our = (statistics.median(run.rate for run in runs[ours]) for ours in (False, True))
    ratio = statistics.median(mine.rate / other.rate for mine, other in zip(runs[True], runs[False], strict=True))
    against = f"bare {bare:,.0f}/s, ours {our:,.0f}/s; medians of {rounds}"
    report.add(
        "rate: deliver, read, acknowledge / XADD, XREADGROUP, XACK", ratio, "x", against=against, at_least=RATE_GOAL
    )
    for ours, name in ((False, "bare"), (True, "ours")):
        client = statistics.median(run.client_s / count * 1e6 for run in runs[ours])
        broker = statistics.median(run.broker_s / count * 1e6 for run in runs[ours])
        report.add(
            f"processor time of a rollout, {name}",
            client + broker,
            "us",
            against=f"client {client:.0f}, broker {broker:.0f}",
        )
    prepared = statistics.median(run.tickets_s / count * 1e6 for run in runs[True])
    report.add("issue and claim of a ticket", prepared, "us", against="before the clock starts; not in the rate")
    return our


async def measure_latency(report: common.Report, server: PrivateBroker, rate: float, args: argparse.Namespace) -> None:
    seconds, rounds = 2, 3 if args.quick else 15
    count = int(rate * seconds)
    report.note(f"latency: {rounds} rounds of {count} rollouts at {rate:,.0f}/s, bare and ours in turn")
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for ours in (False, True):
            receive = Order("receive", ours, server.url, count, rate=rate, size=SIZE)
            run = await queue_runs.run(server, [(receive, ()), (replace(receive, role="send"), ())])
            found[ours].append(common.percentile(run.latencies, 0.99) * 1000)
    p99 = {ours: statistics.median(values) for ours, values in found.items()}
    report.add(
        "added latency p99 at half load",
        p99[True] - p99[False],
        "ms",
        against=f"deliver to read {p99[True]:.1f} ms, XADD to XREADGROUP {p99[False]:.1f} ms, at {rate:,.0f}/s; "
        f"medians of {rounds}",
        at_most=LATENCY_GOAL_MS,
    )


def measure_raw(report: common.Report, server: PrivateBroker, args: argparse.Namespace) -> None:
    """XADD alone, by the broker's own load generator: no Python, nothing read."""
    name = "XADD alone, redis-benchmark"
    program = shutil.which("redis-benchmark") or shutil.which("valkey-benchmark")
    if program is None:
        report.skip(name, "no redis-benchmark on this machine (Debian: redis-tools)")
        return
    count = "20000" if args.quick else "100000"
    argv = [program, "-s", server.url.removeprefix("unix://"), "-n", count, "-c", "2", "-P", "64", "-q"]
    command = ["XADD", "raw", "*", "payload", "x" * SIZE]
    said = subprocess.run([*argv, *command], capture_output=True, text=True, check=False)
    rates = re.findall(r"([0-9.]+) requests per second", said.stdout)
    if said.returncode or not rates:
        report.skip(name, said.stderr.strip()[:80] or "it said no rate")
        return
    report.add(name, float(rates[-1]), "1/s", against="batches of 64, 2 connections")


async def measure_link(report: common.Report, args: argparse.Namespace) -> None:
    name = f"share of the line, {ROUND_TRIP_MS:.0f} ms and {MBIT:.0f} Mbit/s"
    if why := wan.unavailable():
        report.skip(name, why, f">= {LINE_GOAL}")
        return
    seconds = 6.0 if args.quick else 30.0
    report.note(f"wide-area link: plain TCP, then rollouts, {seconds:.0f} s each")
    with (
        wan.link(ROUND_TRIP_MS, MBIT) as link,
        PrivateBroker(wan.HOME, prefix=link.home) as server,
    ):
        line = await asyncio.to_thread(queue_runs.plain_transfer, link, seconds)
        count = int(line * seconds / SIZE)
        # As the relay does: two batches of 128 under way, so that one is on the line while the other is answered.
        receive = Order("receive", True, server.url, count, batch=128, size=SIZE)
        send = replace(receive, role="send", url=server.tcp_url, site="west")
        run = await queue_runs.run(server, [(receive, ()), (send, link.site)])
    ours = count * SIZE / run.seconds
    report.add(
        name,
        ours / line,
        "x",
        against=f"rollouts {ours * 8e-6:.1f} Mbit/s of plain TCP's {line * 8e-6:.1f}; until the last is acknowledged",
        at_least=LINE_GOAL,
    )


if __name__ == "__main__":
    sys.exit(common.run(__doc__ or "", measure))
