"""The warm start: a short supervised stage before policy version 0.

Reinforcement needs a policy that is right sometimes. Right demonstrations teach the task; wrong ones at the end leave
a policy that knows it and is unreliable at it: what RLVR then sharpens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from longshore.config import WarmStartSpec
from longshore.errors import ConfigError
from longshore.learner.lora import trained_parameters
from longshore.learner.ranks.messages import Message
from longshore.learner.ranks.ranks import ALONE, Ranks
from longshore.tasks.rendering import Renderer
from longshore.types import Task

IGNORE = -100


def corrupt(answer: str, alphabet: Sequence[str], rng: random.Random) -> str:
    """A wrong answer of the same length, of characters that answers are made of.

    Example: corrupt("nus", "abcdefg", rng) may be "gad"
    """
    wrong = "".join(rng.choice(alphabet) for _ in answer)
    return wrong if wrong != answer else answer + rng.choice(alphabet)


def demonstrations(tasks: Iterator[Task], renderer: Renderer, spec: WarmStartSpec, seed: int) -> Iterator[list[int]]:
    """Endless demonstrations: the prompt's length, then the prompt's ids and the answer's.

    Raises:
        ConfigError: a task has no answer to demonstrate.
    """
    rng = random.Random(seed)  # noqa: S311 - corruption must be repeatable, not secret
    alphabet: list[str] = []
    clean = round(spec.steps * spec.clean_fraction) * spec.batch_size
    for number, task in enumerate(tasks):
        if not task.answer:
            raise ConfigError(f"warm_start: task {task.task_id} has no answer to demonstrate")
        alphabet += sorted(set(task.answer).difference(alphabet))
        wrong = number >= clean and rng.random() < spec.wrong_fraction
        answer = corrupt(task.answer, alphabet, rng) if wrong else task.answer
        prompt = renderer.prompt_ids(list(task.messages))
        yield [len(prompt), *prompt, *renderer.reply_ids(answer)]


def warm_start(
    policy: torch.nn.Module,
    examples: Iterator[list[int]],
    spec: WarmStartSpec,
    report: Callable[[int, float], bool],
    ranks: Ranks = ALONE,
) -> None:
    """Trains `policy` in place by next-token cross-entropy on the answers.

    `report(step, loss)` is called after each step; when it says False, training ends there. Of ranks that share the
    policy out each takes part, and the leader alone has examples and is asked.
    """
    trained = [parameter for _, parameter in trained_parameters(policy)]
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / spec.steps, step))
    device = next(policy.parameters()).device
    policy.train()
    go_on, step = True, 0
    while go_on and step < spec.steps:
        step += 1
        input_ids, labels, answers = _rows(examples, spec.batch_size, ranks)
        share = {} if ranks.size == 1 else {"num_items_in_batch": answers}
        loss = policy(input_ids=input_ids.to(device), labels=labels.to(device), **share).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        total = float(ranks.summed(loss.detach()))
        said = Message("warm_start", {"go_on": report(step, total)}) if ranks.is_leader else None
        go_on = bool(ranks.shared(said).told["go_on"])


def _rows(examples: Iterator[list[int]], number: int, ranks: Ranks) -> tuple[Tensor, Tensor, int]:
    """This rank's part of the next batch: ids and labels, and how many labels the whole batch has."""
    said = None
    if ranks.is_leader:
        input_ids, labels = _collate([next(examples) for _ in range(number)])
        said = Message("warm_start", {}, {"input_ids": input_ids, "labels": labels})
    batch = ranks.shared(said).tensors
    # A rank that has no row computes one for nothing: all take part in each pass.
    spare = -len(batch["labels"]) % ranks.size
    input_ids = functional.pad(batch["input_ids"], (0, 0, 0, spare))
    labels = functional.pad(batch["labels"], (0, 0, 0, spare), value=IGNORE)
    answers = int((batch["labels"][:, 1:] != IGNORE).sum())
    return input_ids[ranks.rank :: ranks.size], labels[ranks.rank :: ranks.size], answers


def _rate(progress: float, step: int) -> float:
    """Factor of the learning rate: 20 steps of warm-up, then constant, then down to a twentieth over the last 30 %."""
    return min(1.0, (step + 1) / 20) * max(0.05, min(1.0, (1 - progress) / 0.3))


def _collate(examples: list[list[int]]) -> tuple[Tensor, Tensor]:
    """[B, T] ids and labels; prompts and padding carry no loss."""
    longest = max(len(example) for example in examples) - 1
    input_ids = torch.zeros((len(examples), longest), dtype=torch.long)
    labels = torch.full((len(examples), longest), IGNORE, dtype=torch.long)
    for row, (prompt_length, *ids) in enumerate(examples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return input_ids, labels
