"""Weight sync: bytes a version, codec speed, a version's way over a wide-area link, and what syncs cost a generator.

Every figure is a ratio against something measured in the same run; medians of five. Needs root for the link (two
network namespaces), `rsync` and `curl` for the peers, and the `bench` group for the real models; a row says what is
missing.

    python benchmarks/weight_sync.py [--quick] [--json FILE] [--only codec wan generation]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, wan, weight_sync_codec, weight_sync_generation, weight_sync_wan  # noqa: E402
from benchmarks.common_broker import PrivateBroker  # noqa: E402
from benchmarks.weight_sync_codec import CHAINS  # noqa: E402
from benchmarks.weight_sync_steps import Chain, chain, missing  # noqa: E402
from benchmarks.weight_sync_wan import FOLLOWERS, World  # noqa: E402
from longshore.weight_store.codec import delta  # noqa: E402
from longshore.weight_store.payload import Tensor, encode_header, tensor_info  # noqa: E402

SYNCS = 5
PARTS = ("codec", "wan", "generation")


async def measure(report: common.Report, args: argparse.Namespace) -> None:
    if "codec" in args.only:
        await weight_sync_codec.measure(report, args)
    if "wan" in args.only:
        await asyncio.to_thread(measure_wan, report, args)
    if "generation" in args.only:
        await measure_generation(report, args)


def measure_wan(report: common.Report, args: argparse.Namespace) -> None:
    """From publish to resident at the far side, alone and behind a relay, and what peers take."""
    name = "gaussian" if args.quick else "smollm2"
    reason = wan.unavailable() or (f"needs {missing(name)}" if missing(name) else "")
    if reason:
        report.skip("publish -> proven and resident at the far side", reason, "<= 1.25")
        return
    report.note(f"{name}: over the link")
    versions = 2 * SYNCS + 3
    made = chain(name, versions, CHAINS)
    first, second = islice(made.versions(), 2)
    with weight_sync_wan.world(made.folder, versions) as world:
        rate, round_trip = weight_sync_wan.goodput(world, (2 if args.quick else 8) << 20)
        follower = world.follower(world.origin, "follower")
        # The first goes in full; the second warms what the first does not use.
        for _ in range(2):
            world.sync([follower])
        syncs = [world.sync([follower]) for _ in range(SYNCS)]
        follower.end()
        took = statistics.median(sync.seconds[0] for sync in syncs)
        alone = _alone(made, 2, 2 + SYNCS)
        best = alone.bytes / rate + round_trip + alone.encode_s + alone.decode_s
        report.add(
            f"{name}: publish -> proven and resident at the far side",
            took / best,
            "x",
            against=(
                f"{took:.3f} s; limit {best:.3f} s = {alone.bytes / 1e3:,.0f} kB at {rate / 1e6:.1f} MB/s + "
                f"{round_trip:.3f} s round trip + {alone.encode_s:.3f} s encode + {alone.decode_s:.3f} s decode, verify"
            ),
            at_most=1.25,
        )
        # How many times faster than sending everything: a figure of a model's size, not of a small one's.
        goals = (None, None) if args.quick else (50.0, 20.0)
        _measure_peers(report, world, name, (first, second), took, goals)
        _measure_relay(report, world, name, statistics.median(sync.wan_bytes for sync in syncs))


def _measure_peers(
    report: common.Report,
    world: World,
    name: str,
    pair: tuple[list[Tensor], list[Tensor]],
    took: float,
    goals: tuple[float | None, float | None],
) -> None:
    old, new = (_written(world.folder / "peers" / file, own) for file, own in zip(("old", "new"), pair, strict=True))
    whole = weight_sync_wan.over_http(world, new)
    rows = f"{name}: faster than the full file over HTTP", f"{name}: faster than rsync -z --inplace"
    report.add(rows[0], whole / took, "x", against=f"{whole:.1f} s", at_least=goals[0])
    reason = weight_sync_wan.lacks_rsync()
    if reason:
        report.skip(rows[1], reason, ">= 20")
        return
    synced = weight_sync_wan.by_rsync(world, old, new)
    report.add(
        f"{name}: faster than rsync -z --inplace", synced / took, "x", against=f"{synced:.1f} s", at_least=goals[1]
    )


def _measure_relay(report: common.Report, world: World, name: str, single: float) -> None:
    """Eight clients behind a relay, each a process of its own; `single` is what one without a relay takes."""
    with PrivateBroker() as broker:
        address = world.relay(broker)
        followers = [world.follower(address, f"follower-{number}") for number in range(FOLLOWERS)]
        for follower in followers:
            follower.hear()
        world.sync(followers)
        syncs = [world.sync(followers) for _ in range(SYNCS)]
    ratio = statistics.median(sync.wan_bytes for sync in syncs) / single
    report.add(f"{name}: link bytes of {FOLLOWERS} clients behind a relay", ratio, "x", against="one", at_most=1.05)
    spread = statistics.median(max(sync.seconds) / min(sync.seconds) for sync in syncs)
    middle = statistics.median(max(sync.seconds) for sync in syncs)
    report.add(
        f"{name}: last of {FOLLOWERS} resident",
        spread,
        "x",
        against=f"the first; last after {middle:.3f} s",
        at_most=1.3,
    )


@dataclass(frozen=True)
class Alone:
    """What the parts of a sync take, each by itself: medians over a chain's versions."""

    bytes: float
    encode_s: float
    decode_s: float


def _alone(made: Chain, start: int, end: int) -> Alone:
    sizes, encodes, decodes = [], [], []
    versions = islice(made.versions(), start - 1, end)
    before = next(versions)
    for after in versions:
        infos, base_infos = ([tensor_info(tensor) for tensor in tensors] for tensors in (after, before))
        began = time.perf_counter()
        payload = delta.encode(before, after)
        encoded = time.perf_counter()
        delta.decode(payload, before, infos, base_infos=base_infos)
        decodes.append(time.perf_counter() - encoded)
        encodes.append(encoded - began)
        sizes.append(len(payload))
        before = after
    return Alone(statistics.median(sizes), statistics.median(encodes), statistics.median(decodes))


async def measure_generation(report: common.Report, args: argparse.Namespace) -> None:
    loads = [weight_sync_generation.Load("small model", "", 2 if args.quick else 5, 4.0 if args.quick else 10.0)]
    if not args.quick:
        reason = missing("smollm2")
        if reason:
            report.skip("smollm2: tokens/s with a sync every 2 s", f"needs {reason}", ">= 0.98")
        else:
            folder = str(chain("smollm2", 2 * SYNCS + 3, CHAINS).folder)
            loads.append(weight_sync_generation.Load("smollm2", folder, 5, 12.0))
    for load in loads:
        report.note(f"{load.name}: generating")
        await weight_sync_generation.measure(report, load)


def _written(path: Path, tensors: list[Tensor]) -> Path:
    """A safetensors file."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(encode_header(tensors))
        for tensor in tensors:
            file.write(tensor.data)
    return path


def main() -> int:
    made = common.parser(__doc__ or "")
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure these parts alone")
    return common.run(__doc__ or "", measure, made=made)


if __name__ == "__main__":
    sys.exit(main())
