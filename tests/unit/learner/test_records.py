"""The learner's files: what is on record before it happens, and what a crash or a full disk does to it."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from longshore.errors import Unavailable
from longshore.learner import checkpoint, disk
from longshore.learner.batch_log import BatchLog, BatchRecord
from longshore.learner.durable_lines import append_line, newest_epoch, read_lines
from longshore.learner.issue_log import IssueLog, IssueRecord


def record(first, groups=4, epoch=1, **more):
    return IssueRecord(epoch, first, groups, 8, "train", **more)


def test_issue_records_from_a_group_on_are_given_back(tmp_path):
    log = IssueLog(tmp_path / "issued.jsonl")
    records = [record(0), record(4, 2, pin=3), record(6, 1, tasks=("0a",), wish="5-0"), record(7)]
    for item in records:
        log.append(item)
    assert log.after(0) == records
    assert log.after(6) == records[2:]
    assert log.after(11) == []


def test_what_a_superseded_incarnation_recorded_last_does_not_count(tmp_path):
    log = IssueLog(tmp_path / "issued.jsonl")
    for item in [record(0), record(4), record(4, 6, epoch=2), record(8, epoch=1), record(10, epoch=2)]:
        log.append(item)
    assert log.after(0) == [record(0), record(4, 6, epoch=2), record(10, epoch=2)]


def test_a_batch_that_a_superseded_incarnation_recorded_last_does_not_count(tmp_path):
    path = tmp_path / "batches.jsonl"
    log = BatchLog(path)
    assert newest_epoch(path, tmp_path / "none.jsonl") == 0

    def batch(step, epoch, group):
        return BatchRecord(step, epoch, (group,), ((f"{group}.0", 1),))

    # The first was taken over by the second, which fell back to step 2; then the first woke up.
    for item in [batch(1, 1, 0), batch(2, 1, 1), batch(3, 1, 2), batch(3, 2, 3), batch(4, 2, 4), batch(3, 1, 5)]:
        log.append(item)
    assert log.after(1) == [batch(2, 1, 1), batch(3, 2, 3), batch(4, 2, 4)]
    assert newest_epoch(path, tmp_path / "none.jsonl") == 2


def test_late_members_are_on_record_behind_the_others(tmp_path):
    log = BatchLog(tmp_path / "batches.jsonl")
    written = BatchRecord(3, 1, (9,), (("9.0", 1), ("9.1", 1), ("2.3", 1)), ("2.3",))
    log.append(written)
    (read,) = log.after(0)
    assert read == written
    assert (read.members, read.late_members) == ([(9, 0), (9, 1)], [(2, 3)])


def test_a_line_for_which_there_is_no_room_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    append_line(path, {"n": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space"):
            append_line(path, {"n": 2})
    append_line(path, {"n": 3})
    assert read_lines(path) == [{"n": 1}, {"n": 3}]


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "" })', errno.ENOSPC),
        ("Error while serializing: I/O error: Input/output error (os error 5)", errno.EIO),
    ],
)
def test_a_full_disk_under_a_checkpoint_is_told_as_one(tmp_path, monkeypatch, said, code):
    def full(tensors, path):
        raise SafetensorError(said)

    monkeypatch.setattr(checkpoint, "save_file", full)
    snapshot = checkpoint.Snapshot(3, {}, {}, torch.get_rng_state(), {}, {})
    with pytest.raises(OSError) as caught:
        checkpoint.write_checkpoint(tmp_path, snapshot)
    assert caught.value.errno == code
    assert list(tmp_path.iterdir()) == []


async def test_a_full_disk_is_waited_for(monkeypatch):
    monkeypatch.setattr(disk, "PAUSE_S", 0.001)
    tries = []

    def write():
        tries.append(1)
        if len(tries) < 4:
            raise OSError(errno.ENOSPC, "no space left")
        return "done"

    assert await disk.when_there_is_room(write, "it") == "done"
    monkeypatch.setattr(disk, "PATIENCE_S", 0.0)
    tries.clear()
    with pytest.raises(Unavailable, match="disk has been full"):
        await disk.when_there_is_room(write, "it")


async def test_another_fault_of_the_disk_is_not_waited_for():
    def write():
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        await disk.when_there_is_room(write, "it")
