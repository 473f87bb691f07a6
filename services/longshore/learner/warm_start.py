"""The warm start: a short supervised stage before policy version 0.

Reinforcement needs a policy that is right sometimes. Demonstrations that are wrong on purpose in a share of cases
give one that knows the task and is unreliable at it: what RLVR then sharpens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longshore.config import WarmStartSpec
from longshore.errors import ConfigError
from longshore.tasks.rendering import Renderer
from longshore.types import Task

IGNORE = -100


def corrupt(answer: str, rng: random.Random) -> str:
    """A wrong answer that looks like one: the same characters in another order, or one character changed.

    Example: corrupt("nus", rng) may be "uns"
    """
    letters = list(answer)
    rng.shuffle(letters)
    shuffled = "".join(letters)
    if shuffled != answer:
        return shuffled
    return answer + answer[-1:]


def demonstrations(tasks: Iterator[Task], renderer: Renderer, spec: WarmStartSpec, seed: int) -> Iterator[list[int]]:
    """Endless (prompt ids, answer ids) joined: `[prompt..., answer..., eos]` with the prompt's length first.

    Raises:
        ConfigError: a task has no answer to demonstrate.
    """
    rng = random.Random(seed)  # noqa: S311 - corruption must be repeatable, not secret
    for task in tasks:
        if task.answer is None:
            raise ConfigError(f"warm_start: task {task.task_id} has no answer to demonstrate")
        answer = corrupt(task.answer, rng) if rng.random() < spec.wrong_fraction else task.answer
        prompt = renderer.prompt_ids(list(task.messages))
        yield [len(prompt), *prompt, *renderer.reply_ids(answer)]


def warm_start(
    policy: torch.nn.Module,
    examples: Iterator[list[int]],
    spec: WarmStartSpec,
    report: Callable[[int, float], None],
) -> None:
    """Trains `policy` in place by next-token cross-entropy on the answers. `report(step, loss)` after each step."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=spec.learning_rate, weight_decay=0.0)
    warm, total = max(1, spec.steps // 20), spec.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.1, 1 - step / total))
    )
    policy.train()
    for step in range(1, spec.steps + 1):
        input_ids, labels = _collate([next(examples) for _ in range(spec.batch_size)])
        loss = policy(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, float(loss))


def _collate(examples: list[list[int]]) -> tuple[Tensor, Tensor]:
    """[B, T] ids and labels; prompts and padding carry no loss."""
    longest = max(len(example) for example in examples) - 1
    input_ids = torch.zeros((len(examples), longest), dtype=torch.long)
    labels = torch.full((len(examples), longest), IGNORE, dtype=torch.long)
    for row, (prompt_length, *ids) in enumerate(examples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return input_ids, labels
