"""Evaluations beside training: when they are due, what comes of them, and a restart in their midst."""

import json
from types import SimpleNamespace

from builders import TASK, rollout

from longshore.learner.evaluations import AFTER, BEFORE, Evaluations
from longshore.learner.groups import Origin
from longshore.learner.ledger import Ledger
from longshore.learner.progress import Evaluating, Progress
from longshore.types import Purpose

TASKS = 2


class World:
    """A learner's books, with an issuer that keeps no records and a reporter that listens."""

    def __init__(self, every=4, steps=20, ledger=None, progress=None):
        self.ledger, self.progress = ledger or Ledger(), progress or Progress()
        self.told, self.endings, self.checkpoints = [], [], 0
        spec = SimpleNamespace(evaluation=SimpleNamespace(every=every), train=SimpleNamespace(steps=steps), tasks=None)
        parts = SimpleNamespace(
            spec=spec,
            heldout=[TASK] * TASKS,
            ledger=self.ledger,
            progress=self.progress,
            reporter=self,
            publisher=SimpleNamespace(wait=self._nothing),
        )
        durability = SimpleNamespace(add=self.endings.extend, checkpoint=self._checkpoint)
        self.evaluations = Evaluations(parts, self, durability)

    async def _nothing(self, *_):
        pass

    phase = _nothing

    async def _checkpoint(self):
        self.checkpoints += 1

    async def issue_evaluation(self, evaluating):
        self.progress.evaluating.append(evaluating)
        for _ in range(TASKS):
            self.ledger.issue(TASK, Purpose.EVALUATION, 1, evaluating.version)

    async def evaluation(self, running, groups, result):
        self.told.append((running.step, sum(group.closed for group in groups), result))

    def answer(self, version, rewards):
        groups = [item for item in self.ledger.open_groups(Purpose.EVALUATION) if item.pin == version]
        for group, reward in zip(groups, rewards, strict=True):
            origin = Origin(f"{group.group_id}-0")
            if reward is None:
                self.ledger.end_ticket(group.group_id, 0, "attempts_exhausted", origin)
            else:
                made = rollout(group.group_id, 0, reward, version=version, purpose=Purpose.EVALUATION)
                self.ledger.receive(made, origin)

    async def step(self, number):
        self.progress.step = number
        await self.evaluations.look()
        due = self.evaluations.is_due(number)
        self.progress.version = number
        if due:
            await self.evaluations.begin(number)
        return due


async def test_one_is_due_at_each_multiple_and_none_while_another_is_under_way():
    world = World()
    begun = []
    for number in range(1, 21):
        if await world.step(number):
            begun.append(number)
        if number == 9:
            world.answer(4, [1.0, 0.0])
        if number in (12, 13, 17):
            for running in world.progress.evaluating:
                world.answer(running.version, [1.0, 1.0])
    # That of step 8 has to wait until the one before has ended; the last step has one of its own.
    assert begun == [4, 10, 13, 16]
    assert all(result.step in begun for result in world.progress.results)


async def test_none_is_due_unless_the_job_says_so():
    assert not any([await World(every=0).step(number) for number in range(1, 20)])


async def test_training_goes_on_and_the_result_comes_with_the_step_at_which_it_ended():
    world = World()
    for number in range(1, 7):
        await world.step(number)
        assert world.evaluations.metrics() == {}
    assert world.told[-1] == (4, 0, None)
    world.answer(4, [1.0, 0.0])
    await world.step(7)
    told = world.evaluations.metrics()
    assert (told["eval/step"], told["eval/version"], told["eval/reward"], told["eval/scored"]) == (4, 4, 0.5, 2)
    assert 0 < told["eval/low"] < 0.5 < told["eval/high"] < 1
    assert world.evaluations.metrics() == {}
    assert [(end.key, end.outcome) for end in world.endings] == [("0.0", "evaluation"), ("1.0", "evaluation")]
    assert world.ledger.balanced
    assert world.checkpoints == 0


async def test_tasks_that_came_to_nothing_are_told_apart_from_those_that_failed():
    world = World()
    for number in range(1, 5):
        await world.step(number)
    world.answer(4, [0.0, None])
    await world.step(5)
    (result,) = world.progress.results
    assert (result.tasks, result.scored, result.interval.mean) == (2, 1, 0.0)
    world.progress.step = 8
    await world.step(8)
    world.answer(8, [None, None])
    await world.step(9)
    assert world.progress.results[-1].interval is None
    assert "eval/reward" not in world.evaluations.metrics()


async def test_before_and_after_are_waited_for_and_so_is_what_is_under_way_then():
    world = World()
    turns = []

    async def wait():
        turns.append(1)
        world.answer(world.progress.evaluating[0].version, [1.0, 0.0])
        return 1

    await world.evaluations.stand_still(BEFORE, wait)
    await world.evaluations.stand_still(BEFORE, wait)
    assert world.progress.evaluations == {"before": 0.5}
    for number in range(1, 5):
        await world.step(number)
    world.progress.step = world.progress.version = 20
    await world.evaluations.stand_still(AFTER, wait)
    assert [(result.when, result.step) for result in world.progress.results] == [
        ("before", 0),
        ("step", 4),
        ("after", 20),
    ]
    assert (len(turns), world.checkpoints, world.progress.evaluating) == (3, 2, [])


async def test_after_a_restart_each_goes_on_and_none_is_begun_twice():
    world = World()
    for number in range(1, 5):
        await world.step(number)
    progress = Progress.restore(json.loads(json.dumps(world.progress.state())))
    ledger = Ledger.restore(json.loads(json.dumps(world.ledger.state())))
    again = World(ledger=ledger, progress=progress)
    # As the issue record has it: another was begun after the checkpoint, once this one had ended.
    await again.issue_evaluation(Evaluating("step", 8, 8))
    again.answer(8, [1.0, 1.0])
    assert not any([await again.step(number) for number in range(4, 8)])
    # Its result waits until its step has been taken again.
    assert progress.results == []
    assert not await again.step(8)
    assert [(result.step, result.interval.mean) for result in progress.results] == [(8, 1.0)]
    again.answer(4, [0.0, 0.0])
    await again.step(9)
    assert [(result.step, result.interval.mean) for result in progress.results] == [(8, 1.0), (4, 0.0)]
    assert not any([await again.step(number) for number in (10, 11)])
    assert await again.step(12)
    restored = Progress.restore(json.loads(json.dumps(progress.state())))
    assert restored == progress
