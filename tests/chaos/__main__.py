"""`make test-chaos`: kills, stops, partitions and disks that are full, and then the proof that nothing was lost.

Exit code 0 when everything is proven, 1 on any breach. The seed reproduces the schedule; how the machine answers to it
depends on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from chaos.schedule import LEARNER, mix, num_kills
from chaos.session import Session, Settings


def main() -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (default: 0)")
    parser.add_argument("--pace", type=float, default=5.0, help="seconds from kill to kill, on average (default: 5)")
    parser.add_argument("--minutes-limit", type=float, default=0.0, help="no more faults after this; 0: no limit")
    parser.add_argument("--steps", type=int, default=80, help="train steps of a job; jobs follow until all is done")
    parser.add_argument("--replay", action="store_true", help="jobs replay rollouts, and evaluate while they train")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--keep", action="store_true", help="leave logs and state in place")
    parser.add_argument("--only-plan", action="store_true", help="print the schedule's mix and end")
    args = parser.parse_args()
    settings = Settings(args.kills, args.seed, args.pace, args.steps, args.minutes_limit * 60, args.replay)
    # Short, for Unix sockets lie in it.
    session = Session(settings, Path(tempfile.gettempdir()) / f"ls-chaos-{os.getpid()}", _say)
    _print_mix(session)
    if args.only_plan:
        return 0
    began = time.monotonic()
    result = asyncio.run(session.run())
    result["minutes"] = round((time.monotonic() - began) / 60, 2)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    _say(json.dumps({key: value for key, value in result.items() if key not in ("rows", "breaches")}, indent=2))
    session.close(keep=args.keep or bool(result["breaches"]))
    return _verdict(result)


def _print_mix(session: Session) -> None:
    table = mix(session.faults)
    kills = num_kills(session.faults)
    _say(f"seed {session.settings.seed}: {kills} kills, {len(session.faults) - kills} other faults")
    for target, kinds in table.items():
        _say(f"  {target:14} " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    learner = table[LEARNER]["kill"] if LEARNER in table else 0
    _say(f"  the learner's share of the kills: {100 * learner / max(1, kills):.0f} %")
    for skipped in session.skipped:
        _say(f"  skipped: {skipped}")


def _verdict(result: dict[str, object]) -> int:
    breaches = result["breaches"]
    assert isinstance(breaches, list)
    for breach in breaches:
        _say(f"BREACH: {breach}")
    _say("FAILED" if breaches else "PROVEN: nothing lost, nothing trained twice, the reward rose")
    return 1 if breaches else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
