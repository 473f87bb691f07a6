"""Both sides of benchmarks/end_to_end.py, one after the other, and what their checkpoints are worth on held-out tasks.

Longshore's side is `longshore run` of the job: broker, weight store, gateway, learner, generator, actors, verifier,
each a process. Its seconds are those of its own metrics.jsonl, which count from the moment when the learner may train.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from benchmarks.end_to_end_course import ROOT, Course, Scorer

# Of either side's whole run, start included; and of the warm start.
DEADLINE_S = 3600.0
SCORED_AT_ONCE = 125


@dataclass(frozen=True)
class Learned:
    """What a side has done with its budget: one entry a train step each, and the checkpoint that it left."""

    # Since the first step's beginning, at the step's end.
    seconds: list[float]
    # Of all steps so far.
    rollouts: list[float]
    tokens: list[float]
    # Mean of the step's own batch.
    rewards: list[float]
    checkpoint: Path
    detail: str

    @property
    def rate(self) -> float:
        """Sampled tokens that were trained on, a second."""
        return self.tokens[-1] / self.seconds[-1]

    @property
    def mean_reward(self) -> float:
        """Of all rollouts of the budget: how early it learned."""
        return sum(self.rewards) / len(self.rewards)

    def reached(self, target: float, window: int) -> int | None:
        """The first step at whose end the mean reward of the last `window` batches is at least `target`; from 0."""
        for step in range(window - 1, len(self.rewards)):
            if sum(self.rewards[step + 1 - window : step + 1]) / window >= target:
                return step
        return None


def make_course(document: dict[str, Any], folder: Path) -> Course:
    """The course, its checkpoint made by a process that is gone when the sides run."""
    job = folder / "job.json"
    job.write_text(json.dumps(document), encoding="utf-8")
    _run(["-m", "benchmarks.end_to_end_course", str(job), str(folder)], ROOT, folder / "start.log")
    return Course.read(folder / "course.json")


def train_longshore(course: Course, folder: Path) -> Learned:
    """Raises RuntimeError when the job does not succeed."""
    (folder / "job.yaml").write_text(yaml.safe_dump(course.document), encoding="utf-8")
    _run(["-m", "longshore", "run", "job.yaml"], folder, folder / "longshore.log")
    (run_dir,) = (folder / "runs").iterdir()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    staleness = sum(line["off_policy/mean"] for line in lines) / len(lines)
    waited = sum(line["time/wait_for_batch"] for line in lines)
    trained = sum(line["time/forward_backward"] for line in lines)
    return _learned(
        [
            {
                "seconds": seconds,
                "rollouts": line["rollouts"],
                "tokens": line["tokens/sampled"],
                "reward": line["reward/mean"],
            }
            for seconds, line in zip(accumulate(line["time/step"] for line in lines), lines, strict=True)
        ],
        run_dir / "checkpoint",
        f"staleness {staleness:.1f}; learner {trained:.0f} s, waiting {waited:.0f} s",
    )


def train_trl(folder: Path) -> Learned:
    """Raises RuntimeError when its process fails."""
    _run(["-m", "benchmarks.end_to_end_trl", str(folder)], ROOT, folder / "trl.log")
    told = json.loads((folder / "trl.json").read_text(encoding="utf-8"))
    return _learned(told["lines"], folder / "trl", f"{told['threads']} threads")


def heldout_rewards(course: Course, checkpoint: Path, number: int) -> list[float]:
    """[number] rewards of held-out tasks, one attempt each, sampled as in training; the same draws for every caller."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec, scorer, tasks = course.spec, Scorer(course.spec), course.heldout(number)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(course.start, padding_side="left")
    torch.manual_seed(spec.seed)
    found: list[float] = []
    for begin in range(0, len(tasks), SCORED_AT_ONCE):
        part = tasks[begin : begin + SCORED_AT_ONCE]
        asked = [[{"role": said.role, "content": said.content} for said in task.messages] for task in part]
        given = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        limits = {"max_new_tokens": spec.sampling.max_new_tokens, "temperature": spec.sampling.temperature}
        with torch.no_grad():
            drawn = model.generate(**given, do_sample=True, top_k=0, top_p=1.0, **limits)
        replies = tokenizer.batch_decode(drawn[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [scorer.reward(task, reply) for task, reply in zip(part, replies, strict=True)]
    return found


def _learned(lines: Sequence[dict[str, float]], checkpoint: Path, detail: str) -> Learned:
    return Learned(
        [line["seconds"] for line in lines],
        list(accumulate(line["rollouts"] for line in lines)),
        list(accumulate(line["tokens"] for line in lines)),
        [line["reward"] for line in lines],
        checkpoint,
        detail,
    )


def _run(arguments: Sequence[str], cwd: Path, log: Path) -> None:
    """Runs Python to its end. Raises RuntimeError with the log's last lines when it fails or takes too long."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LONGSHORE_", "REDIS_URL"))}
    path = os.pathsep.join([str(ROOT / "services"), str(ROOT)])
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, env={**kept, "PYTHONPATH": path}, stdout=sink, stderr=sink
        )
        try:
            code: int | str = process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            code = f"not done after {DEADLINE_S:.0f} s"
        finally:
            _end(process)
    if code:
        said = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise RuntimeError(f"{' '.join(arguments)}: {code}\n{said}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing is left of it: `longshore run` stops its services when it is told to end."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
