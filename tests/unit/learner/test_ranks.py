"""What ranks of a learner are told, and how a batch is shared out among them; the rest is in tests/distributed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builders import rollout

from longshore.config import parse_job
from longshore.errors import ConfigError, InvalidJobSpec
from longshore.launcher.child import cpu_seconds
from longshore.learner.ranks.messages import Message, decode, encode, payload_bytes
from longshore.learner.ranks.ranks import join
from longshore.learner.ranks.work import NOTHING, from_message, nothing, share_out, to_message
from longshore.learner.sequences import Credit, TrainSequence, sequences_of


def sequences(lengths: list[int]) -> list[TrainSequence]:
    """Replies of some lengths to prompts of three tokens of their own."""
    made: list[TrainSequence] = []
    for number, length in enumerate(lengths):
        one = rollout(0, number, prompt=(number, 1, 2), reply=(7,) * length, logprobs=(-0.5,) * length)
        made += sequences_of(one, Credit([1.0] * length), number, use=1 + number % 2)
    return made


def test_a_message_arrives_as_it_was_sent() -> None:
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "none": torch.empty(0),
        "table": torch.arange(6).view(2, 3),
        "one": torch.tensor(2.5),
    }
    header, payload = encode(Message("step", {"number": 3, "names": ["a"]}, tensors))
    assert payload_bytes(header) == payload.numel()
    got = decode(header, payload)
    assert (got.kind, got.told) == ("step", {"number": 3, "names": ["a"]})
    for name, tensor in tensors.items():
        assert torch.equal(got.tensors[name], tensor)
        assert got.tensors[name].dtype == tensor.dtype
    empty = decode(*encode(Message("idle")))
    assert (empty.kind, empty.told, dict(empty.tensors)) == ("idle", {}, {})


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[5], [40, 40, 40], [90, 3, 3, 3, 3, 3], [60, 1, 50, 2, 40, 3, 30]])
def test_every_token_is_computed_by_one_rank_and_every_rank_takes_part_in_each_round(
    ranks: int, lengths: list[int]
) -> None:
    work = share_out(4, sequences(lengths), 2, 64, ranks)
    given = [place for turn in work.rounds for place in turn if place != NOTHING]
    assert sorted(given) == list(range(len(work.micros)))
    assert {len(turn) for turn in work.rounds} == {ranks}
    assert [work.of(rank) for rank in range(ranks)] == [list(column) for column in zip(*work.rounds, strict=True)]
    assert sum(micro.targets.numel() for micro in work.micros) == work.totals.tokens == sum(lengths)
    longest = max(length + 2 for length in lengths)
    assert all(micro.tree.size <= max(64, longest) for micro in work.micros)


def test_packs_are_cut_smaller_where_a_rank_would_be_idle() -> None:
    alone, together = (share_out(1, sequences([20] * 6), 0, 1000, ranks) for ranks in (1, 2))
    assert len(alone.micros) == 1
    assert sorted(micro.targets.numel() for micro in together.micros) == [60, 60]
    # One sequence cannot be shared out: the other rank looks on.
    assert share_out(1, sequences([20]), 0, 1000, 2).rounds == ((0, NOTHING),)


def test_packs_of_like_size_are_computed_at_the_same_time() -> None:
    work = share_out(1, sequences([60, 10, 58, 12]), 0, 62, 2)
    sizes = [sorted(work.micros[place].tree.size for place in turn) for turn in work.rounds]
    assert sizes[0] == [60, 62]


def test_work_arrives_as_it_was_sent() -> None:
    work = share_out(4, sequences([60, 1, 50, 2]), 2, 64, 2)
    got = from_message(decode(*encode(to_message(work))))
    assert (got.number, got.policy_version, got.rounds) == (4, 2, work.rounds)
    assert got.totals.tokens == work.totals.tokens
    assert torch.equal(got.totals.by_rollout, work.totals.by_rollout)
    assert got.again.tolist() == [False, True, False, True]
    for one, other in zip(got.micros, work.micros, strict=True):
        assert one.tree.nodes == other.tree.nodes
        assert (one.tree.token_ids == other.tree.token_ids).all()
        assert (one.tree.positions == other.tree.positions).all()
        assert torch.equal(one.places, other.places)
        assert torch.equal(one.targets, other.targets)
        for name, stream in vars(other.streams).items():
            assert torch.equal(getattr(one.streams, name), stream), name


def test_a_pass_for_nothing_has_all_that_a_pass_has() -> None:
    micro = nothing()
    assert micro.tree.size == micro.tree.longest == micro.targets.numel() == 1
    assert all(value.numel() == 1 for value in vars(micro.streams).values())


@pytest.mark.parametrize("processes", [0, 65, "two"])
def test_a_number_of_processes_that_cannot_be_is_refused(processes: object) -> None:
    with pytest.raises(InvalidJobSpec, match=r"train\.processes"):
        parse_job(
            {
                "name": "j",
                "tasks": {"source": "jsonl", "path": "/tasks"},
                "verifier": {"name": "exact-match"},
                "train": {"steps": 3, "processes": processes},
            }
        )


def test_more_or_fewer_ranks_than_the_job_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"train\.processes is 2, and 3 processes were started"):
        join(2, "cpu")


def test_ranks_want_a_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"train\.processes is 2, and CUDA_VISIBLE_DEVICES names 1 devices"):
        join(2, "cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_who_works_by_what_it_has_started_is_at_work() -> None:
    # A program that waits for another, which computes.
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(10 ** 10))'])"
    waiting = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        # More than it takes to start Python, and at last all of it is the other's.
        while (used := cpu_seconds(waiting.pid) or 0.0) < own_seconds(waiting.pid) + 0.1:
            assert waiting.poll() is None
            time.sleep(0.01)
        assert used >= 0.1
    finally:
        os.killpg(waiting.pid, signal.SIGKILL)
        waiting.wait()


def own_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
