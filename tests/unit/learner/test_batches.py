"""Batches: which groups are passed over, what becomes of a step that was not taken, and what is known of the tasks."""

from types import SimpleNamespace

from builders import JOB, rollout

from longshore.config import TrainSpec
from longshore.learner.batches import PASSED_OVER_BATCHES, Batches
from longshore.learner.difficulty import TaskBook
from longshore.learner.groups import Origin
from longshore.learner.ledger import Ledger
from longshore.learner.progress import Progress
from longshore.learner.replay.buffer import ReplayBuffer
from longshore.types import Message, Purpose, Task

EQUAL, MIXED = (1.0, 1.0), (1.0, 0.0)


def batches(folder, **train):
    (folder / "learner").mkdir(exist_ok=True)
    spec = TrainSpec(steps=100, groups_per_step=2, group_size=2, **train)
    book = TaskBook()
    buffer = None
    if spec.replay is not None:
        buffer = ReplayBuffer(folder / "replay", spec.replay, 0, 1, lambda _, own: own)
    parts = SimpleNamespace(
        job=JOB,
        spec=SimpleNamespace(train=spec),
        ledger=Ledger(),
        run_dir=folder,
        progress=Progress(step=0, version=0),
        link=SimpleNamespace(epoch=1),
        replay=buffer,
        tasks_known=book,
    )
    return Batches(parts), parts


def comes_home(ledger, rewards):
    task = Task(f"t-{ledger.next_group}", (Message("user", "x"),), "y")
    group = ledger.issue(task, Purpose.TRAIN, len(rewards))
    for index, reward in enumerate(rewards):
        ledger.receive(rollout(group.group_id, index, reward, task=task), Origin(f"{group.group_id}-{index}"))
    return group.group_id


async def test_equal_rewards_are_taken_along_by_default(tmp_path):
    made, parts = batches(tmp_path)
    for rewards in (EQUAL, MIXED):
        comes_home(parts.ledger, rewards)
    batch, endings = await made.take()
    assert ([group.group_id for group in batch.groups], endings) == ([0, 1], [])
    endings = await made.settle(batch, made.credit(batch))
    assert [(end.key, end.outcome) for end in endings] == [
        ("0.0", "zero_variance"),
        ("0.1", "zero_variance"),
        ("1.0", "trained"),
        ("1.1", "trained"),
    ]


async def test_with_resample_they_are_accounted_and_others_take_their_place(tmp_path):
    made, parts = batches(tmp_path, zero_variance="resample")
    for rewards in (EQUAL, MIXED, EQUAL):
        comes_home(parts.ledger, rewards)
    batch, endings = await made.take()
    assert batch is None
    assert [(end.key, end.outcome) for end in endings] == [
        (key, "zero_variance") for key in ("0.0", "0.1", "2.0", "2.1")
    ]
    # Their places are free.
    assert (parts.ledger.num_active, parts.ledger.num_ready) == (1, 1)
    assert parts.ledger.balanced
    comes_home(parts.ledger, MIXED)
    batch, endings = await made.take()
    assert ([group.group_id for group in batch.groups], endings) == ([1, 3], [])


async def test_what_has_a_gradient_is_not_passed_over_because_its_outcomes_are_equal(tmp_path):
    # The longer of two right replies loses something.
    made, parts = batches(tmp_path, zero_variance="resample", overlong={"limit": 4, "buffer": 2})
    for replies in [((7, 1), (7, 7, 7, 1)), ((7, 1), (8, 1)), ((7, 7, 7, 1), (7, 1))]:
        task = Task(f"t-{parts.ledger.next_group}", (Message("user", "x"),), "y")
        group = parts.ledger.issue(task, Purpose.TRAIN, 2)
        for index, reply in enumerate(replies):
            logprobs = (-0.5,) * len(reply)
            item = rollout(group.group_id, index, 1.0, reply=reply, logprobs=logprobs, task=task)
            parts.ledger.receive(item, Origin(f"{group.group_id}-{index}"))
    batch, endings = await made.take()
    assert [group.group_id for group in batch.groups] == [0, 2]
    assert [end.key for end in endings] == ["1.0", "1.1"]


async def test_a_policy_that_has_learned_everything_is_trained_on_all_the_same(tmp_path):
    made, parts = batches(tmp_path, zero_variance="resample")
    passed = 0
    for _ in range(2 * PASSED_OVER_BATCHES + 2):
        comes_home(parts.ledger, EQUAL)
        batch, endings = await made.take()
        passed += len(endings) // 2
    assert passed == 2 * PASSED_OVER_BATCHES
    assert len(batch.groups) == 2
    # The next batch has its own measure.
    comes_home(parts.ledger, EQUAL)
    assert len((await made.take())[1]) == 2


async def test_a_step_that_was_not_taken_is_accounted_and_kept_for_nothing(tmp_path):
    made, parts = batches(tmp_path, replay={"share": 0.5})
    comes_home(parts.ledger, MIXED)
    comes_home(parts.ledger, EQUAL)
    batch, _ = await made.take()
    endings = await made.settle(batch, made.credit(batch), None, spoilt=True)
    assert [end.outcome for end in endings] == ["not_finite"] * 2 + ["zero_variance"] * 2
    assert parts.ledger.balanced
    assert len(parts.replay) == 0


async def test_what_was_trained_on_joins_a_later_batch_with_its_weight_and_its_use(tmp_path):
    made, parts = batches(tmp_path, replay={"share": 0.5, "half_life": 4.0})
    for rewards in (MIXED, EQUAL):
        comes_home(parts.ledger, rewards)
    batch, _ = await made.take()
    await made.record(1, batch)
    parts.progress.step = 1
    await made.settle(batch, made.credit(batch))
    # Equal rewards had no gradient: only the other group is kept.
    assert len(parts.replay) == 1
    parts.progress.version = 8
    for rewards in (MIXED, MIXED):
        comes_home(parts.ledger, rewards)
    batch, _ = await made.take()
    assert [(item.entry.group_id, item.use) for item in batch.replayed] == [(0, 2)]
    credited = made.credit(batch)
    assert credited.rollout_ids == ["2.0", "2.1", "3.0", "3.1", "0.0", "0.1"]
    assert [(one.use, one.group, one.weights[-1]) for one in credited.sequences] == [
        (1, 0, 1.0),
        (1, 0, 1.0),
        (1, 1, 1.0),
        (1, 1, 1.0),
        (2, 2, 0.25),
        (2, 2, 0.25),
    ]
    assert [one.advantages[-1] for one in credited.sequences[4:]] == [0.5, -0.5]
    await made.record(2, batch)
    (record,) = list(made._log.after(1))
    assert (record.members, record.replayed) == ([(2, 0), (2, 1), (3, 0), (3, 1)], [(0, 2)])
    told = made.metrics(batch)
    assert (told["replay/groups"], told["replay/rollouts"], told["replay/mean_use"]) == (1.0, 2.0, 2.0)


async def test_tasks_are_known_by_their_groups(tmp_path):
    made, parts = batches(tmp_path, zero_variance="resample")
    for rewards in (EQUAL, MIXED, MIXED):
        comes_home(parts.ledger, rewards)
    batch, _ = await made.take()
    assert parts.tasks_known.success("t-0") == 1.0
    await made.settle(batch, made.credit(batch))
    assert parts.tasks_known.success("t-1") == 0.5
    assert made.metrics(batch)["tasks/success"] == 2 / 3
    assert made.metrics(batch)["tasks/solved_frac"] == 1 / 3
