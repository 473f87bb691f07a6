"""What one run of a staleness world uses again: the learner's replay buffer, its book of tasks and its curriculum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longshore.config import TrainSpec
from longshore.config_curriculum import CurriculumSpec
from longshore.learner.credit.group import has_signal
from longshore.learner.curriculum import chance
from longshore.learner.difficulty import TaskBook
from longshore.learner.replay.buffer import ReplayBuffer, Replayed
from longshore.learner.replay.strategies import age_weight
from longshore.types import (
    EngineFingerprint,
    FinishReason,
    GivenSpan,
    JobRef,
    Purpose,
    Rollout,
    SampledSpan,
    Sampling,
    Segment,
    TicketRef,
    Turn,
    Verdict,
)

_JOB = JobRef("default", "staleness")
_ENGINE = EngineFingerprint("benchmark", "1", "float32", "")


@dataclass(frozen=True)
class Group:
    """One group of a batch: G rollouts, L tokens each."""

    version: int
    # Of each of its tokens in the batch's loss.
    weight: float
    # [G, L] twice, [G, L], [G]
    prompts: Tensor
    replies: Tensor
    behaviour: Tensor
    rewards: Tensor


class Reuse:
    """What one run knows of its tasks and keeps of its groups."""

    def __init__(self, train: TrainSpec, curriculum: CurriculumSpec | None, seed: int, folder: Path) -> None:
        self._train, self._curriculum = train, curriculum
        self._known = TaskBook()
        self._random = torch.Generator().manual_seed(seed)
        self._buffer: ReplayBuffer | None = None
        if train.replay is not None:
            self._buffer = ReplayBuffer(folder, train.replay, seed, 1, self._success)
        self._taken: list[Replayed] = []

    @property
    def most(self) -> int:
        """Groups that may come beside the fresh ones of a batch."""
        replay = self._train.replay
        return 0 if replay is None else max(1, round(replay.share / (1.0 - replay.share) * self._train.groups_per_step))

    def chosen(self, prompts: Tensor, fresh: Tensor) -> Tensor:
        """Which of all [P, L] prompts are attempted next: [g] places; `fresh` without a curriculum."""
        if self._curriculum is None:
            return fresh
        places: list[int] = []
        while len(places) < len(fresh):
            place = int(torch.randint(len(prompts), (1,), generator=self._random))
            taken = float(torch.rand(1, generator=self._random))
            if taken < chance(self._known.success(task_id(prompts[place].tolist())), self._curriculum):
                places.append(place)
        return torch.tensor(places)

    def replayed(self, number: int) -> list[Group]:
        """The groups that train step `number` uses again."""
        replay = self._train.replay
        if self._buffer is None or replay is None:
            return []
        self._taken = self._buffer.take(number, number - 1, self.most)
        return [
            _unpacked(item.rollouts, age_weight(item.entry.age(number - 1), replay.half_life)) for item in self._taken
        ]

    def settle(self, number: int, fresh: Sequence[Group], ess: float | None) -> None:
        """After train step `number`: what it says of the tasks, and what is kept of its new groups."""
        for group in fresh:
            self._known.observe(task_id(group.prompts[0].tolist()), group.rewards.tolist())
        if self._buffer is None:
            return
        self._buffer.settle(number - 1, self._taken, ess)
        for place, group in enumerate(fresh):
            if has_signal(group.rewards.tolist()):
                self._buffer.offer(number, number - 1, rollouts_of(group, number * len(fresh) + place))
        self._buffer.remove(self._buffer.begin_checkpoint())

    def _success(self, task: str, otherwise: float) -> float:
        known = self._known.success(task)
        return otherwise if known is None else known


def task_id(prompt: Sequence[int]) -> str:
    """Example: task_id([2, 0, 3]) == "2-0-3" """
    return "-".join(map(str, prompt))


def rollouts_of(group: Group, number: int, ask: tuple[int, ...] = ()) -> list[Rollout]:
    """A group as the learner has it; `ask` stands between prompt and reply."""
    return [
        Rollout(
            ref=TicketRef(_JOB, number, index),
            attempt=1,
            purpose=Purpose.TRAIN,
            task_id=task_id(prompt),
            segments=(_segment((*prompt, *ask), reply, logps, group.version),),
            turns=(Turn("0", len(prompt) + len(ask), len(reply), FinishReason.LENGTH),),
            sampling=(Sampling(1.0, len(reply)),),
            engines=(_ENGINE,),
            finish=FinishReason.LENGTH,
            started_at=0.0,
            finished_at=0.0,
            site="home",
            actor="benchmark",
            verdicts=(Verdict(reward, "game@1"),),
        )
        for index, (prompt, reply, logps, reward) in enumerate(
            zip(
                *(getattr(group, name).tolist() for name in ("prompts", "replies", "behaviour", "rewards")), strict=True
            )
        )
    ]


def _rows(group: Group) -> Iterator[tuple[list[int], list[int], list[float], float]]:
    columns = (group.prompts, group.replies, group.behaviour, group.rewards)
    return zip(*(column.tolist() for column in columns), strict=True)


def _segment(given: tuple[int, ...], reply: list[int], logps: list[float], version: int) -> Segment:
    return Segment("0", (*given, *reply), (GivenSpan(len(given)), SampledSpan(version, tuple(logps))))


def _unpacked(rollouts: Sequence[Rollout], weight: float) -> Group:
    segments = [rollout.segments[0] for rollout in rollouts]
    length = rollouts[0].num_sampled
    ids = torch.tensor([segment.token_ids for segment in segments])
    logps = [span.logprobs for segment in segments for span in segment.spans if isinstance(span, SampledSpan)]
    rewards = [rollout.verdict.reward for rollout in rollouts if rollout.verdict is not None]
    return Group(
        rollouts[0].min_version, weight, ids[:, :-length], ids[:, -length:], torch.tensor(logps), torch.tensor(rewards)
    )
