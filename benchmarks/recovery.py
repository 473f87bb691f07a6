"""Recovery: how soon the local stack works again after SIGKILL and SIGSTOP, and how much work is done twice.

    python benchmarks/recovery.py [--quick] [--json FILE]

`longshore up` with one small job (a warm start, then training without end; a checkpoint every 10 train steps), and:

- SIGKILL of the learner at a random moment, then the first train step that it tells of, against 1.5 x (cold start +
  reading the state). The cold start is that of the job's first learner in this run, from the start of its process
  until it could train, without its warm start and without waiting for first rollouts; reading the state is loading and
  verifying the newest checkpoint as the learner does. The recovery has more in it: the supervisor's notice and its
  pause of 0.5 s, the start, the unacknowledged rollouts, and the step itself.
- SIGKILL of every other service: how soon the supervisor notices (<= 3 s).
- SIGSTOP of an actor: until its tickets are with another one (<= its lease of 6 s). SIGSTOP of the others, which hold
  no lease: until the supervisor, which looks at each process every few seconds, has replaced it (<= 15 s).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.recovery_stack import ACTOR_LEASE_S, JOB, START_S, TICK_S, LocalStack, batch_steps
from benchmarks.recovery_times import Recovery, cold_start, redone_steps
from longshore.learner.checkpoint import load_newest
from longshore.telemetry.log import configure_logging

RECOVERY_GOAL = 1.5
NOTICE_GOAL_S = 3.0
# An actor's default lease: what the supervisor's looks are made for.
SILENCE_GOAL_S = 15.0
OTHERS = ("actor-0", "generator-0", "verifier-0", "weights", "gateway", "broker")
WITHOUT_LEASE = ("learner", "generator-0", "verifier-0", "weights", "gateway", "broker")
# Tickets that an actor should hold when it is stopped.
HELD = 4
# Lives shorter than this make the supervisor wait longer before the next start.
CALM_S = 61.0


async def measure(report: common.Report, args: argparse.Namespace) -> None:
    configure_logging("recovery", "benchmark", "error")
    report.note("starting a stack and a job")
    async with LocalStack() as stack:
        await stack.step_after(0.0)
        spawned = next(seen.at for seen in stack.sightings if seen.process == "learner" and seen.pid)
        cold_s = cold_start(spawned, [(told.at, told.event) for told in stack.told])
        await _learner(report, stack, cold_s, kills=1 if args.quick else 5)
        await _killed(report, stack)
        await _stopped_actor(report, stack)
        await _stopped(report, stack)


async def _learner(report: common.Report, stack: LocalStack, cold_s: float, kills: int) -> None:
    interval, chance = JOB["train"]["checkpoint_every"], random.Random(1)
    # Behind the first checkpoint.
    await stack.until(lambda: stack.steps()[-1].event["step"] > interval or None, START_S, "a checkpoint")
    read_s = await asyncio.to_thread(_read_state, stack.run_dir)
    found = []
    for number in range(kills):
        report.note(f"SIGKILL of the learner, {number + 1} of {kills}")
        await asyncio.sleep(chance.uniform(0.0, 3.0) if number == 0 else CALM_S + chance.uniform(0.0, 3.0))
        found.append(await _kill_learner(stack))
    report.add("learner: cold start", cold_s, "s", against="its process's start until it could train, no warm start")
    report.add("learner: reading the state", read_s, "s", against="the newest checkpoint, loaded and verified")
    slowest = max(found, key=lambda recovery: recovery.first_step)
    report.add("learner: SIGKILL noticed", max(r.detected for r in found), "s", at_most=NOTICE_GOAL_S)
    report.add("learner: SIGKILL to the first train step", slowest.first_step, "s", against=f"slowest of {kills}")
    report.add(
        "learner: of cold start + state read",
        slowest.first_step / (cold_s + read_s),
        "x",
        at_most=RECOVERY_GOAL,
    )
    report.add(
        "learner: SIGKILL to the first new train step",
        max(r.first_new_step for r in found),
        "s",
        against="behind those that it took again",
    )
    report.add(
        "learner: train steps redone",
        max(r.redone for r in found),
        "",
        against=", ".join(str(r.redone) for r in found),
        at_most=interval,
    )


def _read_state(run_dir: Path) -> float:
    began = time.monotonic()
    if load_newest(run_dir / "learner" / "checkpoints") is None:
        raise RuntimeError("no checkpoint can be read")
    return time.monotonic() - began


async def _kill_learner(stack: LocalStack) -> Recovery:
    at, pid = stack.send("learner", signal.SIGKILL)
    recorded = batch_steps(stack.run_dir)
    noticed = await _noticed(stack, "learner", at, pid, START_S)
    first = await stack.step_after(at)
    newest = max(recorded)
    new = await stack.until(
        lambda: next((told for told in stack.steps(at) if told.event["step"] > newest), None), START_S, "a new step"
    )
    return Recovery(noticed, first.at - at, new.at - at, redone_steps(recorded, first.event["step"]))


async def _noticed(stack: LocalStack, process: str, at: float, pid: int, within_s: float) -> float:
    """Seconds until the supervisor said that a process is no longer what it was."""
    seen = await stack.until(
        lambda: stack.seen(process, at, lambda s: s.pid != pid), within_s, f"the supervisor to notice {process}"
    )
    return seen.at - at


async def _killed(report: common.Report, stack: LocalStack) -> None:
    for process in OTHERS:
        report.note(f"SIGKILL of {process}")
        at, pid = stack.send(process, signal.SIGKILL)
        noticed = await _noticed(stack, process, at, pid, START_S)
        ready = await stack.ready_again(process, at, pid, START_S) - at
        step = await stack.step_after(at + ready)
        report.add(
            f"{process}: SIGKILL noticed",
            noticed,
            "s",
            against=f"ready again after {ready:.1f} s, next train step after {step.at - at:.1f} s",
            at_most=NOTICE_GOAL_S,
        )


async def _stopped_actor(report: common.Report, stack: LocalStack) -> None:
    report.note("SIGSTOP of actor-0")
    await _holds_some(stack, "actor-0")
    at, pid = stack.send("actor-0", signal.SIGSTOP)
    held = left = set(await stack.held_by("actor-0"))
    # Its own next life takes over what is left, under the same name.
    while left and stack.pid("actor-0") == pid:
        await asyncio.sleep(TICK_S)
        left = left & set(await stack.held_by("actor-0"))
    taken = time.time() - at
    ready = await stack.ready_again("actor-0", at, pid, START_S) - at
    report.add(
        "actor-0: SIGSTOP to its tickets taken over",
        taken,
        "s",
        against=f"lease {ACTOR_LEASE_S} s, {len(held)} tickets; the process replaced after {ready:.1f} s",
        at_most=ACTOR_LEASE_S,
    )


async def _holds_some(stack: LocalStack, actor: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if len(await stack.held_by(actor)) >= HELD:
            return
        await asyncio.sleep(TICK_S)
    raise RuntimeError(f"{actor} never holds {HELD} tickets")


async def _stopped(report: common.Report, stack: LocalStack) -> None:
    report.note(f"SIGSTOP of {', '.join(WITHOUT_LEASE)}, all at once")
    sent = {process: stack.send(process, signal.SIGSTOP) for process in WITHOUT_LEASE}
    noticed = {process: await _noticed(stack, process, *found, START_S) for process, found in sent.items()}
    ready = {process: await stack.ready_again(process, *found, START_S) for process, found in sent.items()}
    step = await stack.step_after(max(ready.values()))
    for process, (at, _) in sent.items():
        report.add(
            f"{process}: SIGSTOP noticed",
            noticed[process],
            "s",
            against=f"killed and ready again after {ready[process] - at:.1f} s",
            at_most=SILENCE_GOAL_S,
        )
    report.add("all of them stopped: to the next train step", step.at - min(at for at, _ in sent.values()), "s")


if __name__ == "__main__":
    sys.exit(common.run(__doc__, measure))
