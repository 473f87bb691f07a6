"""Poison: malformed, oversized, forged and replayed rollouts at the learner's real intake, over a real broker.

    python benchmarks/poison.py [--quick] [--json FILE]

100,000 entries of all kinds of tests/support/poison.py (5,000 with --quick) go into the rollouts stream of one job, in
a random order that the seed reproduces, with honest deliveries and replays of them in between. Most are forged past
every function; one delivery in eight is poison from the ticket's own holder. Shown are what got in (only what is
honest may), what was set aside and why, how long it took, and the memory of learner and broker.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import structlog
from poison import KINDS
from poison_bench import GROUP_SIZE, Mixer, PoisonBench, peak_mebibytes

from benchmarks import common
from benchmarks.common_broker import PrivateBroker
from longshore.rollout_queue import broker
from longshore.types import JobRef

FULL, QUICK = 100_000, 5_000
# Poison for each honest delivery, about.
SHARE = 50
# Deliveries between two readings of the stream.
TURN = 20
SEED = 1


async def measure(report: common.Report, args: argparse.Namespace) -> None:
    """Fills the report."""
    poison = QUICK if args.quick else FULL
    # What the learner says of each is not what is measured, nor fit for a table.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with PrivateBroker() as server:
        client = broker.connect(server.url)
        bench = PoisonBench(client, JobRef("default", "poison"))
        try:
            mixer, seconds, peaks = await _run(report, bench, poison)
            await _judge(report, bench, mixer, poison, seconds, peaks)
        finally:
            await client.aclose()


async def _run(
    report: common.Report, bench: PoisonBench, poison: int
) -> tuple[Mixer, float, list[tuple[float, float]]]:
    """Sends everything and takes it in. Returns the sender, the seconds that taking in took, and (this process's peak,
    the broker's memory) in MiB after each tenth."""
    await bench.open(poison // SHARE // GROUP_SIZE)
    claims = await bench.claim_all()
    mixer, seconds = Mixer(bench, KINDS, SEED), 0.0
    peaks: list[tuple[float, float]] = []
    for start in range(0, len(claims), TURN):
        turn = claims[start : start + TURN]
        await mixer.send(turn, SHARE * len(turn))
        began = time.perf_counter()
        await bench.take_in()
        seconds += time.perf_counter() - began
        if start * 10 // len(claims) >= len(peaks):
            memory = await bench.redis.info("memory")
            peaks.append((peak_mebibytes(), memory["used_memory"] / 2**20))
            report.note(f"{sum(mixer.sent.values()):,} sent, {len(mixer.honest):,} honest deliveries among them")
    return mixer, seconds, peaks


async def _judge(
    report: common.Report,
    bench: PoisonBench,
    mixer: Mixer,
    poison: int,
    seconds: float,
    peaks: list[tuple[float, float]],
) -> None:
    # Raises AssertionError, and so fails, when anything but what is honest is in the ledger.
    bench.check_books(mixer.honest, mixer.poisoned)
    counts = await bench.link.counts()
    report.add("kinds", len([kind for kind in KINDS if mixer.sent[kind.name]]), at_least=40)
    sent = sum(mixer.sent[kind.name] for kind in KINDS)
    report.add("poison sent", sent, against=f"and {mixer.sent['a replay']:,} replays", at_least=poison)
    taken = sum(len(group.rollouts) for group in bench.ledger.open.values())
    report.add("poison in the ledger", taken - len(mixer.honest), at_most=0)
    report.add("honest rollouts taken", taken, against=f"{len(mixer.honest):,} delivered", at_least=len(mixer.honest))
    rejected = sum(len(group.final_reasons) for group in bench.ledger.open.values())
    report.add("tickets their holders spoiled", rejected, against=f"{len(mixer.poisoned):,} spoiled, all rejected")
    report.add("ledger imbalance", abs(counts.imbalance) + abs(counts.issued - bench.ledger.issued), at_most=0)
    reasons = await bench.reasons()
    report.add("dead letters kept", reasons.total(), against=f"reasons: {', '.join(sorted(reasons))}", at_most=1200)
    report.add("rate", sum(mixer.sent.values()) / seconds, "entries/s")
    first, last = peaks[1], peaks[-1]
    report.add(
        "memory of the learner, grown", last[0] - first[0], "MiB", against=f"peak {last[0]:.0f} MiB", at_most=200
    )
    report.add("memory of the broker, grown", last[1] - first[1], "MiB", against=f"now {last[1]:.0f} MiB", at_most=200)


if __name__ == "__main__":
    sys.exit(common.run(__doc__ or "", measure))
