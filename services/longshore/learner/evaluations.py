"""Evaluations: every held-out task is attempted once, by one policy version alone.

    before, after        no train step is taken meanwhile
    every `every` steps  training goes on; the version is pinned to its number, and to its place in the weight store

One at a time, but after a crash: then each that was begun since the checkpoint goes on. What is under way is in the
issue record and in the ledger, and what came of it in the progress; an incarnation that takes a step again finds that
its evaluation was begun, or is done.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict

from longshore.learner.durability import Durability
from longshore.learner.groups import Group
from longshore.learner.intervals import interval_of
from longshore.learner.issuer import Issuer
from longshore.learner.parts import Parts
from longshore.learner.progress import Evaluating, Evaluation
from longshore.learner.statistics import rewards_of
from longshore.types import Purpose

EVALUATION = "evaluation"
BEFORE, STEP, AFTER = "before", "step", "after"

# One turn of the learner's waiting; returns how many entries came home.
Wait = Callable[[], Awaitable[int]]


class Evaluations:
    """The evaluations of one learner incarnation."""

    def __init__(self, parts: Parts, issuer: Issuer, durability: Durability) -> None:
        self._parts, self._issuer, self._durability = parts, issuer, durability
        self._ledger, self._progress, self._reporter = parts.ledger, parts.progress, parts.reporter
        # For the line of the step during which it ended.
        self._told: dict[str, float] = {}

    async def stand_still(self, when: str, wait: Wait) -> None:
        """Evaluates the version just published, `before` or `after` training; and ends first what is under way."""
        if not self._parts.heldout or when in self._progress.evaluations:
            return
        await self._parts.publisher.wait()
        await self._reporter.phase(f"evaluate_{when}")
        if all(running.when != when for running in self._progress.evaluating):
            await self._issuer.issue_evaluation(Evaluating(when, self._progress.step, self._progress.version))
        for running in list(self._progress.evaluating):
            while not self._is_closed(running):
                if await wait():
                    await self._reporter.evaluation(running, self._groups(running), None)
            await self._end(running)
        await self._durability.checkpoint()

    def is_due(self, step: int) -> bool:
        """Whether one begins with the version of train step `step`: at each multiple of `every`, or as soon as the one
        before has ended. Never with the last step, which has an evaluation of its own."""
        spec = self._parts.spec
        every = spec.evaluation.every
        if not every or not self._parts.heldout or self._progress.evaluating or step >= spec.train.steps:
            return False
        return step // every > self._progress.evaluated_step // every

    async def begin(self, step: int) -> None:
        """Has the held-out tasks attempted by the newest version, and does not wait for it."""
        await self._issuer.issue_evaluation(Evaluating(STEP, step, self._progress.version))

    async def look(self) -> None:
        """Takes in what has come of those under way, if they have ended. Called between train steps."""
        for running in list(self._progress.evaluating):
            if not self._is_closed(running):
                await self._reporter.evaluation(running, self._groups(running), None)
            elif running.step <= self._progress.step:
                # Else a life before this one began it, and its step is still to be taken again.
                await self._end(running)

    def metrics(self) -> dict[str, float]:
        """Of an evaluation that ended since the last call; empty: none did."""
        told, self._told = self._told, {}
        return told

    def _groups(self, running: Evaluating) -> list[Group]:
        # No two evaluations are of the same version.
        return [group for group in self._ledger.open_groups(Purpose.EVALUATION) if group.pin == running.version]

    def _is_closed(self, running: Evaluating) -> bool:
        return all(group.closed for group in self._groups(running))

    async def _end(self, running: Evaluating) -> None:
        """Closes the books on it: what came is its result, and what awaits a verdict is not waited for."""
        groups = self._groups(running)
        rewards = [next(iter(rewards_of(group)), None) for group in groups]
        scored = [reward for reward in rewards if reward is not None]
        result = Evaluation(**asdict(running), tasks=len(groups), scored=len(scored), interval=interval_of(scored))
        self._progress.evaluating.remove(running)
        self._progress.add_evaluation(result, rewards)
        self._told = result.metrics()
        await self._reporter.evaluation(running, groups, result)
        for group in groups:
            self._durability.add(self._ledger.settle(group, EVALUATION))
            if self._ledger.group(group.group_id) is not None:
                # An evaluation does not wait for verdicts, and nothing held out is trained on later.
                self._durability.add(self._ledger.abandon(group, EVALUATION))
