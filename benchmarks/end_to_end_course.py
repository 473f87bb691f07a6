"""What both sides of benchmarks/end_to_end.py begin with: the job, its tasks, and the checkpoint that they start from.

    python -m benchmarks.end_to_end_course JOB.json FOLDER     makes the checkpoint, writes FOLDER/course.json

`first-light` is examples/first-light.yaml: replies of 4 to 7 tokens. `alphabet` has replies of lognormal length: two
letters of an alphabet of 96 are given, and all from the one to the other are wanted. Imports torch late.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from longshore.config import JobSpec, TrainSpec, parse_job
from longshore.tasks import registry
from longshore.tasks.examples import open_source
from longshore.tasks.source import TrainCursor, heldout_tasks
from longshore.tasks.verification import ScoreRequest, Verifier
from longshore.types import Message, Task

ROOT = Path(__file__).resolve().parent.parent
# As the learner service does: training tasks that a new model's tokenizer is made from.
TOKENIZER_TASKS = 2000
NUM_TASKS, MEAN_REPLY, LONGEST_REPLY = 12_000, 12, 96
LETTERS = [chr(0x4E00 + place) for place in range(96)]

_ALPHABET: dict[str, Any] = {
    "name": "alphabet",
    "model": {
        "kind": "new",
        "hidden_size": 128,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "intermediate_size": 256,
        "max_context": 112,
        "rope_theta": 100,
    },
    "tasks": {"source": "jsonl", "heldout_fraction": 0.2},
    "verifier": {"name": "exact-match"},
    "sampling": {"temperature": 1.0, "max_new_tokens": 104},
    "warm_start": {
        "steps": 300,
        "batch_size": 32,
        "learning_rate": 3e-3,
        "clean_fraction": 0.9,
        "wrong_fraction": 0.5,
    },
    "train": {
        "steps": 60,
        "groups_per_step": 16,
        "group_size": 8,
        "learning_rate": 3e-4,
        "target_staleness": 1,
    },
    "weights": {"dtype": "float32"},
}
# Small enough for a start and both sides within a minute: three to five letters, backward.
_QUICK: dict[str, Any] = {
    **_ALPHABET,
    "name": "quick",
    "model": {
        "kind": "new",
        "hidden_size": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "intermediate_size": 128,
        "max_context": 48,
    },
    "tasks": {
        "source": "reasoning-gym",
        "dataset": "spell_backward",
        "options": {"min_word_len": 3, "max_word_len": 5},
        "heldout_fraction": 0.1,
    },
    "verifier": {"name": "reasoning-gym"},
    "sampling": {"temperature": 1.0, "max_new_tokens": 10},
    "warm_start": {"steps": 60, "batch_size": 16},
    "train": {**_ALPHABET["train"], "steps": 12, "groups_per_step": 8, "group_size": 4, "learning_rate": 1e-3},
}
ALPHABET, FIRST_LIGHT, QUICK = "alphabet", "first-light", "quick"
# Held-out tasks that a policy is judged by; there are some 2800 different tasks of the alphabet, a fifth held out.
NUM_HELDOUT = {ALPHABET: 400, FIRST_LIGHT: 500, QUICK: 100}


@dataclass(frozen=True)
class Course:
    """One job from one checkpoint, for either side. Example: Course.read(folder / "course.json")"""

    # The job as a document, its model a directory.
    document: dict[str, Any]

    @staticmethod
    def read(path: Path) -> Course:
        return Course(json.loads(path.read_text(encoding="utf-8")))

    @property
    def spec(self) -> JobSpec:
        return parse_job(self.document)

    @property
    def start(self) -> Path:
        """The checkpoint that both sides begin with."""
        return Path(self.document["model"]["path"])

    def train_tasks(self, number: int) -> list[Task]:
        """The first tasks that the job's tickets are for, in their order."""
        return list(islice(_train_tasks(self.spec), number))

    def heldout(self, number: int) -> list[Task]:
        """Tasks that nothing is trained on."""
        spec = self.spec
        source = open_source(spec.tasks, spec.seed, spec.environment.name)
        return heldout_tasks(source, spec.tasks.heldout_fraction, number)


class Scorer:
    """The job's verifier, called as a function."""

    def __init__(self, spec: JobSpec) -> None:
        made: Verifier = registry.load(registry.VERIFIERS, spec.verifier.name)(spec.verifier.options)
        self._verifier = made

    def reward(self, task: Task, reply: str) -> float:
        conversation = [*task.messages, Message("assistant", reply)]
        return self._verifier.score(ScoreRequest(task, conversation, reply)).reward


def learning_rate(train: TrainSpec, step: int) -> float:
    """Of train step `step` (from 1), as `learner/trainer.py` has it."""
    warm = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
    if train.final_learning_rate is None:
        return train.learning_rate * warm
    progress = (step - 1) / max(1, train.steps - 1)
    return warm * (train.learning_rate + (train.final_learning_rate - train.learning_rate) * progress)


def job_of(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """The job's document, its data in `folder`: DAPO's objective, as TRL has it too, and no evaluation of its own."""
    if name == FIRST_LIGHT:
        document: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "first-light.yaml").read_text(encoding="utf-8"))
    elif name == QUICK:
        document = _QUICK
    else:
        path = folder / "alphabet.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in _alphabet(seed)), encoding="utf-8")
        document = {**_ALPHABET, "tasks": {**_ALPHABET["tasks"], "path": str(path)}}
    train = {**document["train"], "objective": {"name": "dapo"}}
    left = {name: part for name, part in document.items() if name != "evaluation"}
    return {**left, "train": train, "seed": seed}


def _alphabet(seed: int) -> Iterator[dict[str, str]]:
    """How many letters: lognormal, sigma 1, mean 12, 1 to 96."""
    rng = random.Random(seed)
    for _ in range(NUM_TASKS):
        number = min(LONGEST_REPLY, max(1, round(rng.lognormvariate(math.log(MEAN_REPLY) - 0.5, 1.0))))
        first = rng.randrange(len(LETTERS) - number + 1)
        answer = LETTERS[first : first + number]
        yield {"prompt": answer[0] + answer[-1], "answer": "".join(answer)}


def make_start(document: dict[str, Any], folder: Path) -> Course:
    """Makes the job's model, with its warm start if it has one, as the checkpoint directory `folder`/start."""
    import torch

    from longshore.learner.model import build_policy, save_checkpoint
    from longshore.learner.warm_start import demonstrations, warm_start
    from longshore.tasks.rendering import Renderer

    torch.set_num_threads(1)
    spec = parse_job(document)
    policy, assets = build_policy(spec, islice(_train_tasks(spec), TOKENIZER_TASKS), folder / "models")
    if spec.warm_start is not None:
        examples = demonstrations(_train_tasks(spec), Renderer(assets), spec.warm_start, spec.seed)
        warm_start(policy, examples, spec.warm_start, lambda step, loss: True)
    start = folder / "start"
    save_checkpoint(policy, assets, start)
    left = {name: part for name, part in document.items() if name != "warm_start"}
    return Course({**left, "model": {"kind": "directory", "path": str(start)}})


def _train_tasks(spec: JobSpec) -> Iterator[Task]:
    source = open_source(spec.tasks, spec.seed, spec.environment.name)
    return iter(TrainCursor(source, spec.tasks.heldout_fraction, seed=spec.seed).next, None)


def main(job: Path, folder: Path) -> None:
    course = make_start(json.loads(job.read_text(encoding="utf-8")), folder)
    (folder / "course.json").write_text(json.dumps(course.document), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
