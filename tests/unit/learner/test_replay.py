"""The replay buffer: what it keeps, draws and lets go, and that a crash at any write costs it nothing."""

import collections
import json
import os
from dataclasses import replace

import pytest
from builders import rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.config_replay import ReplaySpec
from longshore.errors import IntegrityError
from longshore.learner.replay import buffer as buffer_module
from longshore.learner.replay import files as group_files
from longshore.learner.replay.buffer import ReplayBuffer
from longshore.learner.replay.entry import Entry
from longshore.learner.replay.files import packed, unpacked
from longshore.learner.replay.reach import Reach
from longshore.learner.replay.strategies import (
    ADMISSIONS,
    PRIORITIES,
    Moment,
    age_weight,
    drawn,
    evictions,
)


def entry(group_id, *, version=0, uses=1, success=0.5, magnitude=0.5):
    return Entry(group_id, f"t-{group_id}", (0, 1), uses, f"g{group_id}", "", 100, version, 1, success, magnitude)


def group(group_id, version=0, rewards=(1.0, 0.0)):
    return [rollout(group_id, index, reward, version=version) for index, reward in enumerate(rewards)]


def buffer_in(folder, epoch=1, success=lambda task_id, own: own, **spec):
    return ReplayBuffer(folder, ReplaySpec(**{"ess_floor": 0.0, **spec}), seed=7, epoch=epoch, success=success)


def ids(replayed):
    return [item.entry.group_id for item in replayed]


AT = Moment(version=10, max_age=19, success=lambda item: item.success)


# -- strategies ----------------------------------------------------------------------------------------------------


def test_priorities_by_hand():
    item = entry(1, version=5, success=0.8, magnitude=0.4)
    found = {name: weight(item, AT) for name, weight in PRIORITIES.items()}
    assert found == pytest.approx({"uniform": 1.0, "recency": 0.75, "advantage": 0.4, "difficulty": 0.2})
    hopeless = entry(1, version=-1000, success=1.0, magnitude=0.0)
    assert min(weight(hopeless, AT) for weight in PRIORITIES.values()) == 0.05


def test_admissions_by_hand():
    kept = {name: [admit(item, AT) for item in (entry(1, version=0, success=0.5), entry(2, version=1, success=0.6))]
            for name, admit in ADMISSIONS.items()}  # fmt: skip
    assert kept == {"signal": [True, True], "hard": [True, False], "young": [False, True]}


def test_evictions_by_hand():
    items = [entry(1, version=3, uses=1, success=0.1), entry(2, version=1, uses=2, success=0.9)]
    first = {name: min(items, key=lambda item: evictions(name, "difficulty")(item, AT)).group_id for name in
             ("oldest", "most-used", "least-priority")}  # fmt: skip
    assert first == {"oldest": 2, "most-used": 2, "least-priority": 2}
    assert min(items, key=lambda item: evictions("least-priority", "recency")(item, AT)).group_id == 2
    assert (
        min(items, key=lambda item: evictions("most-used", "recency")(replace(item, uses=3 - item.uses), AT)).group_id
        == 1
    )


def test_weights_halve_with_age():
    assert [age_weight(age, 8.0) for age in (0, 8, 24)] == [1.0, 0.5, 0.125]
    assert age_weight(1000, None) == 1.0


def test_draws_are_as_likely_as_their_weights_and_repeatable():
    items = [entry(1), entry(2), entry(3)]
    weights = {1: 1.0, 2: 2.0, 3: 5.0}
    firsts = collections.Counter(
        drawn(items, lambda item: weights[item.group_id], f"s/{n}")[0].group_id for n in range(4000)
    )
    assert {key: count / 4000 for key, count in firsts.items()} == pytest.approx(
        {1: 0.125, 2: 0.25, 3: 0.625}, abs=0.03
    )
    assert drawn(items, lambda _: 1.0, "x") == drawn(reversed(items), lambda _: 1.0, "x")


def test_the_reach_falls_fast_and_recovers_slowly():
    reach = Reach().after(0.1, 0.3)
    assert reach.value == pytest.approx(0.7)
    assert (reach.max_age(10), reach.groups(10)) == (7, 7)
    # Nothing was replayed: nothing speaks against more.
    assert reach.after(None, 0.3).value == pytest.approx(0.75)
    assert reach.after(0.4, 0.3).value == pytest.approx(0.75)
    assert Reach().after(0.9, 0.3) == Reach()
    # Without a floor it stays.
    assert reach.after(0.0, 0.0) is reach
    for _ in range(100):
        reach = reach.after(0.0, 0.3)
    assert (reach.max_age(10), reach.groups(10)) == (1, 0)


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_travelled(tmp_path):
    travelled = unpacked(packed(group(3)), group_files.hashlib.sha256(packed(group(3))).hexdigest())
    assert [item.ref for item in travelled] == [item.ref for item in group(3)]
    # What has travelled once comes to the same bits again.
    data = packed(travelled)
    assert unpacked(data, group_files.hashlib.sha256(data).hexdigest()) == travelled
    assert data == packed(group(3))


def test_a_damaged_file_is_told():
    data = packed(group(3))
    sha256 = group_files.hashlib.sha256(data).hexdigest()
    with pytest.raises(IntegrityError, match="checksum"):
        unpacked(data[:-1], sha256)


# -- buffer --------------------------------------------------------------------------------------------------------


def test_a_group_is_used_at_most_so_often(tmp_path):
    buffer = buffer_in(tmp_path, max_uses=3)
    assert buffer.offer(1, 0, group(4))
    uses = []
    for number in range(2, 9):
        replayed = buffer.take(number, number, 2)
        uses += [item.use for item in replayed]
        assert all(item.rollouts[0].ref.group_id == 4 for item in replayed)
        buffer.settle(number, replayed, None)
    assert uses == [2, 3]
    assert (len(buffer), buffer.num_bytes) == (0, 0)


def test_a_group_goes_when_it_is_too_old(tmp_path):
    buffer = buffer_in(tmp_path, max_age=5)
    buffer.offer(1, 3, group(1, version=3))
    assert ids(buffer.take(2, 8, 1)) == [1]
    assert ids(buffer.take(2, 9, 1)) == []
    buffer.settle(9, [], None)
    assert len(buffer) == 0


def test_the_oldest_goes_when_there_is_no_room(tmp_path):
    size = len(packed(group(1)))
    buffer = buffer_in(tmp_path)
    buffer._limit = 2 * size + size // 2
    assert [buffer.offer(n, n, group(n, version=n)) for n in (1, 2, 3)] == [True, True, True]
    assert sorted(ids(buffer.take(4, 4, 9))) == [2, 3]
    # One that would have to go first itself is not taken, and nobody goes for it.
    assert not buffer.offer(4, 4, group(4, version=0))
    assert sorted(ids(buffer.take(4, 4, 9))) == [2, 3]
    assert not buffer.offer(5, 5, group(5, rewards=(1.0, 0.0) * 3))
    assert buffer.num_bytes <= buffer._limit


def test_there_is_a_most_number_of_groups_too(tmp_path, monkeypatch):
    monkeypatch.setattr(buffer_module, "MAX_GROUPS", 3)
    buffer = buffer_in(tmp_path)
    assert all(buffer.offer(n, n, group(n, version=n)) for n in range(5))
    assert sorted(ids(buffer.take(6, 6, 9))) == [2, 3, 4]


def test_a_narrow_reach_takes_less_and_younger(tmp_path):
    buffer = buffer_in(tmp_path, max_age=10, ess_floor=0.5)
    for n in range(8):
        buffer.offer(n, n, group(n, version=n))
    assert len(buffer.take(9, 8, 8)) == 8
    buffer.settle(8, [], 0.2)
    buffer.settle(8, [], 0.2)
    # The reach is 0.49: at most 4 groups, of at most 5 versions.
    assert len(buffer.take(9, 8, 8)) == 4
    assert min(ids(buffer.take(9, 8, 8))) >= 3


def test_each_step_draws_anew(tmp_path):
    buffer = buffer_in(tmp_path)
    for n in range(8):
        buffer.offer(n, n, group(n, version=n))
    assert len({tuple(ids(buffer.take(number, 8, 2))) for number in range(20)}) > 5


def test_what_a_checkpoint_will_name_is_synced_with_its_folder(tmp_path, monkeypatch):
    buffer, synced = buffer_in(tmp_path), []
    monkeypatch.setattr(group_files, "sync", lambda path: synced.append(path.name))
    for n in (1, 2):
        buffer.offer(n, 0, group(n))
    buffer.make_durable(buffer.begin_checkpoint())
    assert synced == ["group-1-1.bin", "group-2-1.bin", tmp_path.name]
    buffer.make_durable(buffer.begin_checkpoint())
    assert synced[3:] == [tmp_path.name]


def test_what_spoilt_a_step_is_not_replayed_again(tmp_path):
    buffer = buffer_in(tmp_path)
    buffer.offer(1, 0, group(1))
    buffer.settle(1, buffer.take(2, 0, 1), None, spoilt=True)
    assert len(buffer) == 0


def test_a_damaged_group_is_passed_over_and_let_go(tmp_path):
    buffer = buffer_in(tmp_path)
    for n in (1, 2):
        buffer.offer(n, 0, group(n))
    (tmp_path / "group-1-1.bin").write_bytes(b"rot")
    assert ids(buffer.take(3, 0, 2)) == [2]
    assert len(buffer) == 1
    with pytest.raises(LookupError, match="group 1 is not kept for its use 2"):
        buffer.take_recorded([(1, 2)])


def test_recorded_groups_are_had_again_in_their_order_and_with_their_use(tmp_path):
    buffer = buffer_in(tmp_path)
    for n in (1, 2, 3):
        buffer.offer(n, 0, group(n))
    assert ids(buffer.take_recorded([(3, 2), (1, 2)])) == [3, 1]
    with pytest.raises(LookupError, match="use 3"):
        buffer.take_recorded([(3, 3)])
    (tmp_path / "group-2-1.bin").write_bytes(b"rot")
    with pytest.raises(LookupError, match="group 2: the file"):
        buffer.take_recorded([(2, 2)])


def test_what_recorded_batches_name_stays_until_they_are_taken(tmp_path):
    buffer = buffer_in(tmp_path, max_age=5, admit="hard")
    buffer.hold([1])
    # Neither its ease nor its age counts now.
    assert buffer.offer(1, 0, group(1, rewards=(1.0, 1.0, 0.0)))
    buffer.settle(100, [], None)
    assert ids(buffer.take_recorded([(1, 2)])) == [1]
    buffer.hold([])
    buffer.settle(100, [], None)
    assert len(buffer) == 0


def test_the_tasks_estimate_counts_before_the_groups_own(tmp_path):
    known = {"t-1": 0.9}
    buffer = buffer_in(tmp_path, success=lambda task_id, own: known.get(task_id, own), admit="hard")
    assert not buffer.offer(1, 0, group(1, rewards=(0.0, 0.0, 1.0)))
    known.clear()
    assert buffer.offer(1, 0, group(2, rewards=(0.0, 0.0, 1.0)))


# -- crashes -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


class Disk:
    """Counts the calls that change the disk; at the chosen one the process dies, before or after it took effect."""

    def __init__(self, monkeypatch, die_at, after):
        self.calls, self._die_at, self._after = 0, die_at, after
        for owner, name in ((group_files.Path, "write_bytes"), (group_files.Path, "rename"),
                            (group_files.Path, "unlink"), (os, "fsync")):  # fmt: skip
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, call):
        def wrapped(*args, **more):
            self.calls += 1
            if self.calls == self._die_at and not self._after:
                raise Killed
            result = call(*args, **more)
            if self.calls == self._die_at:
                raise Killed
            return result

        return wrapped


class Learner:
    """What a learner does with its buffer: fresh groups are given by the step's number, and batches are recorded
    before they are taken. `durable` and `records` outlive it."""

    def __init__(self, folder, durable, records, epoch):
        self.durable, self.records = durable, records
        self.buffer = buffer_in(folder, epoch, max_uses=3, max_age=6, share=0.5)
        self.buffer.restore(durable.get("replay"))
        self.step = durable.get("step", 0)
        self.history = list(durable.get("history", []))

    def run(self, until):
        pending = {number: uses for number, uses in self.records.items() if number > self.step}
        while self.step < until:
            number = self.step + 1
            self.buffer.hold(group for uses in pending.values() for group, _ in uses)
            if number in pending:
                replayed = self.buffer.take_recorded(pending.pop(number))
            else:
                replayed = self.buffer.take(number, self.step, 2)
                self.records[number] = [(item.entry.group_id, item.use) for item in replayed]
            self.buffer.hold(group for uses in pending.values() for group, _ in uses)
            self.history.append([(item.entry.group_id, item.use) for item in replayed])
            self.step = number
            self.buffer.settle(number - 1, replayed, None)
            for fresh in (2 * number, 2 * number + 1):
                self.buffer.offer(number, number - 1, group(fresh, version=number - 1))
            if number % 3 == 0:
                self.checkpoint()

    def checkpoint(self):
        state = json.dumps({"replay": self.buffer.state(), "step": self.step, "history": self.history})
        files = self.buffer.begin_checkpoint()
        self.buffer.make_durable(files)
        # One act, as the checkpoint's own rename.
        self.durable.clear()
        self.durable.update(json.loads(state))
        self.buffer.remove(files)


STEPS = 10


def test_a_learner_that_dies_at_any_write_replays_the_same_groups(tmp_path, monkeypatch):
    def course(folder, die_at, after):
        durable, records = {}, {}
        with monkeypatch.context() as patch:
            disk = Disk(patch, die_at, after)
            try:
                Learner(folder, durable, records, 1).run(STEPS)
            except Killed:
                pass
            else:
                assert die_at == 0 or disk.calls < die_at
        learner = Learner(folder, durable, records, 2)
        learner.run(STEPS)
        learner.checkpoint()
        assert {path.name for path in folder.iterdir()} == {item.file for item in learner.buffer._entries.values()}
        return [[tuple(use) for use in step] for step in learner.history], disk.calls

    expected, calls = course(tmp_path / "calm", 0, False)
    uses = [use for step in expected for use in step]
    assert len(uses) == len(set(uses)) > STEPS
    for die_at in range(1, calls + 1):
        for after in (False, True):
            history, _ = course(tmp_path / f"{die_at}-{after}", die_at, after)
            assert history == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["offer", "take", "restart"]), st.integers(0, 12), st.integers(2, 5)), max_size=30
    ),
    st.sampled_from(["oldest", "most-used", "least-priority"]),
)
def test_the_bound_holds_and_no_use_comes_twice(tmp_path_factory, course, evict):
    folder = tmp_path_factory.mktemp("replay")
    buffer = buffer_in(folder, evict=evict, max_uses=4, max_age=8)
    size = len(packed(group(1)))
    buffer._limit = limit = 4 * size
    seen = set()
    for number, (what, age, members) in enumerate(course):
        version = number + 1
        if what == "offer":
            fresh = group(number, version=max(0, version - age), rewards=(1.0, 0.0, 0.5, 0.2, 0.1)[:members])
            buffer.offer(number, version, fresh)
        elif what == "take":
            replayed = buffer.take(number, version, members)
            uses = [(item.entry.group_id, item.use) for item in replayed]
            assert not seen.intersection(uses)
            seen.update(uses)
            buffer.settle(version, replayed, None)
        else:
            state = json.loads(json.dumps(buffer.state()))
            buffer = buffer_in(folder, epoch=number + 2, evict=evict, max_uses=4, max_age=8)
            buffer._limit = limit
            buffer.restore(state)
            assert len(list(folder.iterdir())) == len(buffer)
        assert buffer.num_bytes == sum(item.num_bytes for item in buffer._entries.values()) <= limit
    assert max((use for _, use in seen), default=2) <= 4


def test_a_file_that_is_gone_at_a_start_is_told_and_left_out(tmp_path):
    buffer = buffer_in(tmp_path)
    for n in (1, 2):
        buffer.offer(n, 0, group(n))
    state = buffer.state()
    (tmp_path / "group-1-1.bin").unlink()
    (tmp_path / ".group-9-1.bin.part").write_bytes(b"torn")
    again = buffer_in(tmp_path, epoch=2)
    again.restore(state)
    assert ids(again.take(3, 0, 5)) == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["group-2-1.bin"]
