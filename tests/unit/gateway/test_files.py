"""What is read from a job's folder: series of metrics, checkpoints, batch records; and cursors of pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longshore.errors import Conflict, NotFound
from longshore.gateway import checkpoints
from longshore.gateway.pages import cursor_of, read_cursor
from longshore.gateway.problems import Problem
from longshore.gateway.rollout_views import _batch, _step_of
from longshore.gateway.series import read_series


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    lines = [
        json.dumps({"step": float(n), "reward": n / 10, "odd": n if n % 2 else float("nan")}) for n in range(1, 11)
    ]
    path.write_text("\n".join(lines) + '\n{"step": 11.0, "rew')
    return path


def test_a_series_has_what_was_asked_for(metrics: Path) -> None:
    found = read_series(metrics, ["reward", "reward"], after=7, points=100)
    assert found == {"names": ["reward"], "steps": [8, 9, 10], "series": {"reward": [0.8, 0.9, 1.0]}}
    whole = read_series(metrics, [], after=0, points=100)
    assert whole["names"] == ["odd", "reward", "step"]
    assert whole["series"]["odd"][:2] == [1.0, None]


@pytest.mark.parametrize(
    ("points", "steps"), [(10, list(range(1, 11))), (5, [2, 4, 6, 8, 10]), (3, [2, 6, 10]), (1, [10])]
)
def test_long_series_are_thinned_and_end_with_the_newest(metrics: Path, points: int, steps: list[int]) -> None:
    assert read_series(metrics, ["reward"], 0, points)["steps"] == steps


def test_unknown_metrics_and_jobs_without_any(metrics: Path) -> None:
    with pytest.raises(NotFound, match="there are: odd, reward, step"):
        read_series(metrics, ["rewardz"], 0, 10)
    assert read_series(metrics.parent / "none.jsonl", ["reward"], 0, 10)["steps"] == []


def make_checkpoint(run: Path, name: str, step: int) -> None:
    folder = run / "learner" / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * step)
    (folder / "manifest.json").write_text(json.dumps({"step": step, "sha256": {"model.safetensors": "ab"}}))


def test_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    assert checkpoints.list_checkpoints(tmp_path) == []
    make_checkpoint(tmp_path, "checkpoint_000001", 5)
    make_checkpoint(tmp_path, "checkpoint_000002", 9)
    (tmp_path / "learner" / "checkpoints" / "checkpoint_000003").mkdir()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    found = checkpoints.list_checkpoints(tmp_path)
    assert [(item.name, item.step) for item in found] == [
        ("final", None),
        ("checkpoint_000002", 9),
        ("checkpoint_000001", 5),
    ]
    assert [(file.name, file.sha256) for file in found[1].files] == [
        ("manifest.json", None),
        ("model.safetensors", "ab"),
    ]


def test_a_pinned_checkpoint_outlives_the_learners_own(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "checkpoint_000001", 5)
    assert checkpoints.pin(tmp_path, "checkpoint_000001").pinned
    checkpoints.pin(tmp_path, "checkpoint_000001")
    for path in (tmp_path / "learner" / "checkpoints" / "checkpoint_000001").iterdir():
        path.unlink()
    (tmp_path / "learner" / "checkpoints" / "checkpoint_000001").rmdir()
    (found,) = checkpoints.list_checkpoints(tmp_path)
    assert (found.step, found.pinned) == (5, True)
    assert checkpoints.checkpoint_file(tmp_path, found.name, "model.safetensors").read_bytes() == b"xxxxx"
    checkpoints.unpin(tmp_path, found.name)
    assert checkpoints.list_checkpoints(tmp_path) == []
    with pytest.raises(NotFound):
        checkpoints.unpin(tmp_path, found.name)
    with pytest.raises(NotFound):
        checkpoints.pin(tmp_path, found.name)
    with pytest.raises(Conflict):
        checkpoints.pin(tmp_path, "final")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("checkpoint_000001", "../../../secret"),
        ("checkpoint_000001", "none"),
        ("..", "secret"),
        ("checkpoint_000001/..", "secret"),
        ("final", "secret"),
    ],
)
def test_no_name_leads_out_of_a_checkpoint(tmp_path: Path, name: str, file: str) -> None:
    make_checkpoint(tmp_path, "checkpoint_000001", 5)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "learner" / "checkpoints" / "secret").write_text("x")
    with pytest.raises(NotFound):
        checkpoints.checkpoint_file(tmp_path, name, file)


def test_batches_are_found_by_step_and_by_rollout(tmp_path: Path) -> None:
    path = tmp_path / "batches.jsonl"
    records = [
        {"step": 1, "epoch": 1, "groups": [0], "uses": [["0.1", 1], ["0.0", 1]], "late": []},
        {"step": 2, "epoch": 1, "groups": [10], "uses": [["10.1", 1], ["2.0", 1]], "late": []},
        {"step": 2, "epoch": 2, "groups": [9], "uses": [["9.0", 1]], "late": []},
        {"step": 12, "epoch": 2, "groups": [10], "uses": [["10.1", 1]], "late": []},
    ]
    path.write_text("".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records) + '{"step":13,"ep')
    assert [view["id"] for view in _batch(path, 1)] == ["0.0", "0.1"]
    assert [view["id"] for view in _batch(path, 2)] == ["9.0"]
    assert _batch(path, 13) == _batch(tmp_path / "none", 1) == []
    assert (_step_of(path, "10.1"), _step_of(path, "0.0"), _step_of(path, "0")) == (12, 1, None)


def test_cursors_come_back_and_others_are_refused() -> None:
    assert read_cursor(cursor_of(1733000000.123456, "j-1")) == (1733000000.123456, "j-1")
    assert read_cursor(None) is None
    for wrong in ("", "x", "e30", "W10", "WzEsIDJd", "WyJhIiwgImIiXQ", "W05hTiwgImEiXQ", "WzEuMCwgIlx1MDAwMCJd", "é"):
        with pytest.raises(Problem):
            read_cursor(wrong)
