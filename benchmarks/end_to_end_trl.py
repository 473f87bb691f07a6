"""TRL's side of benchmarks/end_to_end.py: GRPOTrainer with its own loop, its own generate, and the job's verifier.

    python -m benchmarks.end_to_end_trl FOLDER     reads FOLDER/course.json, writes FOLDER/trl.json and FOLDER/trl/

Time counts from the first train step's beginning: imports and loading are left out.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.end_to_end_course import Course, Scorer, learning_rate
from longshore.config_objective import DapoObjective

PROBED_TOKENS = 48


class Books(TrainerCallback):  # type: ignore[misc]
    """One line a train step, and the reward function that knows what goes into it."""

    def __init__(self, course: Course, number: int) -> None:
        self._tasks, self._scorer = course.train_tasks(number), Scorer(course.spec)
        self.lines: list[dict[str, float]] = []
        self._drawn: dict[str, float] = {}
        self._began = 0.0

    def dataset(self) -> Any:
        """The tasks' prompts as conversations: the tokenizer's chat template makes tokens of them, as in Longshore."""
        prompts = [[{"role": said.role, "content": said.content} for said in task.messages] for task in self._tasks]
        return Dataset.from_dict({"prompt": prompts, "number": list(range(len(prompts)))})

    def rewards(self, completions: Any, number: list[int], completion_ids: list[list[int]], **_: Any) -> list[float]:
        replies = [completion[0]["content"] for completion in completions]
        found = [self._scorer.reward(self._tasks[at], reply) for at, reply in zip(number, replies, strict=True)]
        sampled = float(sum(len(ids) for ids in completion_ids))
        self._drawn = {"rollouts": float(len(found)), "tokens": sampled, "reward": sum(found) / len(found)}
        return found

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.lines.append({"seconds": time.perf_counter() - self._began, **self._drawn})


def train(folder: Path) -> None:
    """Trains to the end of the course's budget; one forward and backward pass a step holds the whole batch."""
    logging.set_verbosity_error()
    course = Course.read(folder / "course.json")
    spec = course.spec
    model = AutoModelForCausalLM.from_pretrained(course.start, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(course.start, padding_side="left")
    torch.manual_seed(spec.seed)
    threads = _fastest_threads(model, spec.train.batch_size)
    torch.set_num_threads(threads)
    books = Books(course, spec.train.steps * spec.train.groups_per_step)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.train.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(spec.train, step + 1) / spec.train.learning_rate
    )
    with tempfile.TemporaryDirectory() as scratch:
        GRPOTrainer(
            model=model,
            reward_funcs=books.rewards,
            args=_arguments(course, scratch),
            train_dataset=books.dataset(),
            processing_class=tokenizer,
            callbacks=[books],
            optimizers=(optimizer, schedule),
        ).train()
    model.save_pretrained(folder / "trl")
    tokenizer.save_pretrained(folder / "trl")
    (folder / "trl.json").write_text(json.dumps({"threads": threads, "lines": books.lines}), encoding="utf-8")


def _arguments(course: Course, scratch: str) -> GRPOConfig:
    spec, objective = course.spec, course.spec.train.objective
    assert isinstance(objective, DapoObjective)
    return GRPOConfig(
        output_dir=scratch,
        seed=spec.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        # Fastest here: one pass, for the batch is padded to its longest reply however it is cut.
        per_device_train_batch_size=spec.train.batch_size,
        gradient_accumulation_steps=1,
        num_generations=spec.train.group_size,
        max_completion_length=spec.sampling.max_new_tokens,
        temperature=spec.sampling.temperature,
        beta=0.0,
        num_iterations=1,
        loss_type="dapo",
        epsilon=objective.clip_low,
        epsilon_high=objective.clip_high,
        max_grad_norm=spec.train.max_grad_norm,
        max_steps=spec.train.steps,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def _fastest_threads(model: Any, batch: int) -> int:
    """How many threads make a forward and backward pass fastest here, now: on a busy machine not all cores do."""
    ids = torch.zeros((batch, PROBED_TOKENS), dtype=torch.long)
    times = {}
    for threads in range(1, len(os.sched_getaffinity(0)) + 1):
        torch.set_num_threads(threads)
        took = []
        for _ in range(3):
            began = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            took.append(time.perf_counter() - began)
        times[threads] = min(took)
    model.zero_grad(set_to_none=True)
    return min(times, key=times.__getitem__)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
