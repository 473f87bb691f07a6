"""A whole job whose learner is two processes; each of them is killed, and who started them. `make test-distributed`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from local_processes import processes_that_mention

LONGSHORE = [sys.executable, "-m", "longshore"]
STEPS, GROUPS, SIZE = 20, 4, 4
LIMIT_S = 600
JOB = {
    "name": "two",
    "model": {"kind": "new", "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 128},
    "tasks": {
        "source": "reasoning-gym",
        "dataset": "spell_backward",
        "options": {"min_word_len": 3, "max_word_len": 4},
        "heldout_fraction": 0.1,
    },
    "verifier": {"name": "reasoning-gym"},
    "sampling": {"max_new_tokens": 6},
    "warm_start": {"steps": 20, "batch_size": 8},
    "train": {
        "steps": STEPS,
        "groups_per_step": GROUPS,
        "group_size": SIZE,
        "checkpoint_every": 3,
        "processes": 2,
    },
    "evaluation": {"tasks": 5},
    "weights": {"dtype": "float32"},
    "resources": {"actors": 1},
}


def test_each_process_of_a_learner_is_killed_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    with (tmp_path / "out").open("wb") as out:
        running = subprocess.Popen([*LONGSHORE, "run", "job.yaml"], cwd=tmp_path, stdout=out, stderr=out)
    try:
        for step, victim in ((4, "RANK=1"), (8, "RANK=0"), (12, "starter")):
            _until(lambda step=step: _steps(tmp_path) >= step, running, f"step {step}")
            before = _learner(tmp_path)
            assert before.keys() == {"starter", "RANK=0", "RANK=1"}
            os.kill(before[victim], signal.SIGKILL)
            # The others end with it, whoever it was, and all begin anew.
            _until(
                lambda before=before: not set(before.values()) & set(_learner(tmp_path).values()), running, "the end"
            )
        code = running.wait(LIMIT_S)
    finally:
        running.kill()
        running.wait()
    assert code == 0, (tmp_path / "out").read_text()
    (run,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["state"], summary["steps"]) == ("succeeded", STEPS)
    # Exactly what was needed was issued, so nothing was lost and nothing was made up for.
    assert summary["rollouts_issued"] == STEPS * GROUPS * SIZE + 10
    assert summary["rollouts_issued"] == summary["rollouts_trained"] + sum(summary["rollouts_accounted"].values())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    # The generator computes what the learner has published, and the learner what it has gathered.
    same = [line["mismatch_kl/same_version"] for line in lines if "mismatch_kl/same_version" in line]
    assert same
    assert max(same) < 1e-4
    (newest, *_) = sorted((run / "learner" / "checkpoints").iterdir(), reverse=True)
    assert len(list(newest.glob("shard-*.safetensors"))) == 2
    assert _learner(tmp_path) == {}


def _learner(folder: Path) -> dict[str, int]:
    """Pids of the learner's ranks, and of who started them."""
    found = {}
    for pid in processes_that_mention(str(folder)):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"LONGSHORE_NAME=learner" in environment:
            ranks = [item.decode() for item in environment if item.startswith(b"RANK=")]
            found[ranks[0] if ranks else "starter"] = pid
    return found


def _steps(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in (folder / "runs").glob("*/metrics.jsonl"))


def _until(condition: Callable[[], bool], running: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert running.poll() is None, f"the job ended before {what}"
        assert time.monotonic() < deadline, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.05)
