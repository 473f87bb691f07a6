from __future__ import annotations

import pytest

from longshore.gateway.states import MOVES, JobState, progress_after, sources_of


def test_every_state_can_be_reached_and_ended() -> None:
    assert set(MOVES) == set(JobState)
    reached, frontier = {JobState.QUEUED}, [JobState.QUEUED]
    while frontier:
        new = MOVES[frontier.pop()] - reached
        reached |= new
        frontier += new
    assert reached == set(JobState)
    assert {state for state in JobState if state.ended} == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


def test_nothing_goes_back_but_what_was_paused() -> None:
    order = list(JobState)
    back = {
        (state, target)
        for state, targets in MOVES.items()
        for target in targets
        if order.index(target) < order.index(state)
    }
    assert back == {(JobState.PAUSED, JobState.QUEUED)}


def test_a_job_can_be_cancelled_until_it_ends() -> None:
    ends = {JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    assert set(sources_of(JobState.CANCELLING)) == set(JobState) - ends


@pytest.mark.parametrize(
    ("kind", "body", "adds"),
    [
        ("phase", {"phase": "train", "detail": ""}, {"phase": "train"}),
        (
            "step",
            {"step": 3, "steps": 9, "metrics": {"reward/mean": 0.5, "grad_norm": 1.0, "policy_version": 3}},
            {"step": 3, "steps": 9, "reward/mean": 0.5, "policy_version": 3},
        ),
        ("evaluation", {"when": "before", "done": 5, "tasks": 5, "reward": 0.2}, {"eval_before": 0.2}),
        ("evaluation", {"when": "before", "done": 4, "tasks": 5, "reward": None}, {}),
        ("summary", {"summary": {"state": "cancelled"}}, {"outcome": "cancelled"}),
        ("warning", {"message": "slow"}, {}),
        ("step", {"step": 3, "steps": 9, "metrics": None}, {"step": 3, "steps": 9}),
        ("summary", {"summary": "malformed"}, {}),
    ],
)
def test_progress_keeps_what_a_list_of_jobs_shows(kind: str, body: dict[str, object], adds: dict[str, object]) -> None:
    assert progress_after({"old": 1}, kind, body) == {"old": 1, **adds}
