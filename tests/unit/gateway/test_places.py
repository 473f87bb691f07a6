"""Who gets a place: quotas, room, and fairness between projects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.config import parse_job
from longshore.gateway.places import NO_LIMITS, Limits, Use, Wish, needs_of, place


def wish(job: str, since: float = 0.0, generators: int = 1, gpus: int = 0) -> Wish:
    """A job of the project that its name begins with."""
    return Wish(job, job[0], since, Use(1, generators, gpus))


def test_without_limits_everybody_gets_a_place() -> None:
    assert set(place([wish("a1"), wish("b1"), wish("a2")], [], {}, NO_LIMITS)) == {"a1", "a2", "b1"}


def test_a_project_waits_for_its_own_quota_and_holds_up_nobody() -> None:
    waiting = [wish(f"a{n}", n) for n in range(5)] + [wish("b0", 9)]
    assert place(waiting, [wish("a9")], {"a": Limits(jobs=2)}, NO_LIMITS) == ["b0", "a0"]
    assert place(waiting, [], {"a": Limits(generators=0)}, NO_LIMITS) == ["b0"]


def test_projects_take_turns_when_there_is_little_room() -> None:
    waiting = [wish(f"a{n}", n) for n in range(5)] + [wish(f"b{n}", 100 + n) for n in range(2)]
    assert place(waiting, [], {}, Limits(jobs=4)) == ["a0", "b0", "a1", "b1"]
    # What a project has already counts against it.
    assert place(waiting, [wish("a7"), wish("a8")], {}, Limits(jobs=4)) == ["b0", "b1"]


def test_shares_are_of_what_is_scarce() -> None:
    placed = [wish("a0", gpus=4)]
    waiting = [wish("a1", 1, gpus=1), wish("b1", 2, gpus=1), wish("b2", 3, gpus=1)]
    assert place(waiting, placed, {}, Limits(jobs=100, gpus=6)) == ["b1", "b2"]


def test_a_large_job_is_not_passed_by_for_ever() -> None:
    waiting = [wish("a0", 0, gpus=8), wish("b0", 1, gpus=1)]
    assert place(waiting, [wish("c0", gpus=1)], {}, Limits(gpus=8)) == []
    assert place(waiting, [], {}, Limits(gpus=8)) == ["a0"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 3)), max_size=12),
    st.integers(0, 6),
    st.integers(0, 6),
)
def test_no_limit_is_ever_exceeded(jobs: list[tuple[str, int, int]], quota: int, room: int) -> None:
    waiting = [wish(f"{project}{n}", n, generators, gpus) for n, (project, generators, gpus) in enumerate(jobs)]
    limits = {"a": Limits(generators=quota)}
    chosen = place(waiting, [], limits, Limits(gpus=room))
    assert len(set(chosen)) == len(chosen)
    taken = [item for item in waiting if item.job in chosen]
    assert sum(item.needs.gpus for item in taken) <= room
    assert sum(item.needs.generators for item in taken if item.project == "a") <= quota
    # Within a project the order of waiting is kept.
    for project in "abc":
        own = [item.job for item in waiting if item.project == project]
        assert [job for job in chosen if job[0] == project] == own[: sum(job[0] == project for job in chosen)]


@pytest.mark.parametrize(
    ("more", "needs"),
    [
        ({}, Use(1, 1, 0)),
        ({"sites": [{"name": "west"}, {"name": "east"}]}, Use(1, 3, 0)),
        ({"sites": [{"name": "west"}], "resources": {"actors": 0}}, Use(1, 1, 0)),
        ({"train": {"steps": 1, "compute": {"device": "cuda"}}}, Use(1, 1, 1)),
        ({"train": {"steps": 1, "compute": {"device": "cuda"}, "processes": 8}}, Use(1, 1, 8)),
        ({"train": {"steps": 1, "processes": 8}}, Use(1, 1, 0)),
        ({"resources": {"generators": 3}, "generator": {"engine": "vllm", "tensor_parallel": 2}}, Use(1, 3, 6)),
    ],
)
def test_what_a_job_needs(more: dict[str, object], needs: Use) -> None:
    base = {"name": "j", "tasks": {"source": "jsonl"}, "verifier": {"name": "exact-match"}, "train": {"steps": 1}}
    assert needs_of(parse_job({**base, **more})) == needs
