"""Several jobs, and several seeds of each, in step: tiny policies, a task without a verifier's cost, and the learner's
own credit, objectives, normalisation, controls of variance, schedule and replay.

Rollouts are drawn from the weights of a version that is a given number of versions old, never a younger one, and carry
the log-probs and the version of those weights, as an engine's would. Nothing else is delayed, reordered or lost. The
runs share nothing but the operations that compute them: what each of them does is, step by step, what the learner's
Trainer does with the same rollouts (tests/unit/benchmarks/test_staleness_world.py), at a small part of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.staleness_game import Game
from benchmarks.staleness_loss import PARTS, Drawn, Loss
from benchmarks.staleness_policy import Policies, flat, new_policy
from benchmarks.staleness_reuse import Reuse
from longshore.config import TrainSpec
from longshore.config_curriculum import CurriculumSpec
from longshore.learner.credit.group import has_signal

# Of the Trainer's AdamW.
BETAS, EPSILON = (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class Job:
    """What a JobSpec's `train` says, and how many versions old its rollouts are. The jobs of a world differ in what
    they minimise and how fast; steps and batches are those of the first."""

    train: TrainSpec
    staleness: tuple[int, ...]
    curriculum: CurriculumSpec | None = None


@dataclass(frozen=True)
class Setting:
    """What is run."""

    game: Game
    jobs: tuple[Job, ...]
    # Of each job at each staleness.
    seeds: tuple[int, ...]
    # Train steps between two looks at the current policy.
    look_every: int = 16


@dataclass
class Course:
    """What came of one seed. Lists have one entry a look."""

    steps: list[int] = field(default_factory=list)
    # Expected reward of the policy of that step over all prompts.
    rewards: list[float] = field(default_factory=list)
    # Means over the train steps since the look before.
    kl: list[float] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    masked: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)

    def steps_to(self, target: float, window: int = 4) -> int | None:
        """Train steps until the mean of `window` looks reached the target; None: it did not."""
        for end in range(window, len(self.rewards) + 1):
            if math.fsum(self.rewards[end - window : end]) / window >= target:
                return self.steps[end - 1]
        return None

    def final(self, window: int = 8) -> float:
        """Mean reward of the last looks."""
        last = self.rewards[-window:]
        return math.fsum(last) / len(last)


class World:
    """Policies that learn from rollouts of their own past."""

    def __init__(self, setting: Setting, folder: Path | None = None) -> None:
        """
        Args:
            setting: what is run.
            folder: for the replay buffers; absent: there are none.
        """
        self.setting, game = setting, setting.game
        self._ask, self._train = game.symbols, setting.jobs[0].train
        policies = [new_policy(game.symbols + 1, 2 * game.length + 1, seed) for seed in setting.seeds]
        self._policies = Policies(policies[0])
        ages = [age for job in setting.jobs for age in job.staleness for _ in setting.seeds]
        # [S]
        self._ages = torch.tensor(ages)
        # [S, D], with their moments and how many steps were taken.
        self.weights = torch.stack([flat(policy) for policy in policies]).repeat(len(ages) // len(policies), 1)
        self._moments = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self._taken = torch.zeros(len(ages))
        # [V, S, D] the newest versions; version v is at v modulo V.
        self._versions = self.weights.new_empty(max(ages) + 1, *self.weights.shape)
        self._losses: list[Loss] = []
        # By run: what it uses again.
        self._reuse: dict[int, Reuse] = {}
        start = 0
        for job in setting.jobs:
            own = range(start, start + len(job.staleness) * len(setting.seeds))
            self._losses.append(Loss(job.train, slice(own.start, own.stop)))
            if job.curriculum is not None or job.train.replay is not None:
                assert folder is not None
                seeds = setting.seeds * len(job.staleness)
                for run, seed in zip(own, seeds, strict=True):
                    self._reuse[run] = Reuse(job.train, job.curriculum, seed, folder / str(run))
            start = own.stop
        self._random = torch.Generator().manual_seed(setting.seeds[0])
        self._all = game.prompts

    def run(self) -> list[Course]:
        """All train steps; a course for each job, staleness and seed, in this order."""
        setting = self.setting
        courses = [Course() for _ in self.weights]
        told: list[Tensor] = []
        for number in range(1, self._train.steps + 1):
            told.append(self.step(number, self.draw(number)))
            if number % setting.look_every == 0:
                means = torch.stack(told).nanmean(0).tolist()
                for course, reward, values in zip(courses, self.look(), means, strict=True):
                    course.steps.append(number)
                    course.rewards.append(reward)
                    for name, value in zip(("kl", "ess", "masked", "entropy"), values, strict=True):
                        getattr(course, name).append(value)
                told.clear()
        return courses

    def look(self) -> list[float]:
        """[S] expected rewards of the newest weights, over all prompts and replies: no sampling, no noise."""
        game, count = self.setting.game, len(self.weights)
        right = game.answers(self._all)
        rows = torch.cat([self._all, torch.full((len(right), 1), self._ask), right[:, :-1]], 1)
        with torch.no_grad():
            log_probs = self._policies.log_probs(self.weights, rows.expand(count, -1, -1), game.length)
        chances = log_probs.gather(3, right.expand(count, -1, -1)[..., None])[..., 0].double().exp()
        rewards: list[float] = game.earned(chances).mean(1).tolist()
        return rewards

    # -- rollouts ----------------------------------------------------------------------------------------------------

    def draw(self, number: int) -> Drawn:
        """The rollouts of train step `number`; to be called for each in turn, before the step."""
        train, game, runs = self._train, self.setting.game, len(self.weights)
        kept = len(self._versions)
        self._versions[(number - 1) % kept] = self.weights
        versions = (number - 1 - self._ages).clamp(min=0)
        weights = self._versions[versions % kept, torch.arange(runs)]
        chosen = torch.randint(len(self._all), (runs, train.groups_per_step), generator=self._random)
        for run, reuse in self._reuse.items():
            chosen[run] = reuse.chosen(self._all, chosen[run])
        prompts = self._all[chosen].repeat_interleave(train.group_size, 1)
        rows = torch.cat([prompts, torch.full((*prompts.shape[:2], 1), self._ask)], 2)
        logps = []
        with torch.no_grad():
            for _ in range(game.length):
                log_probs = self._policies.log_probs(weights, rows)[:, :, 0]
                drawn = log_probs.flatten(0, 1).exp().multinomial(1, generator=self._random).view(*rows.shape[:2], 1)
                logps.append(log_probs.gather(2, drawn))
                rows = torch.cat([rows, drawn], 2)
        replies = rows[:, :, game.length + 1 :]
        rewards = game.rewards(prompts, replies)
        ages = versions[:, None].expand(rewards.shape)
        fresh = Drawn(ages, torch.ones_like(rewards), prompts, replies, torch.cat(logps, 2), rewards)
        return self._with_replayed(number, fresh) if self._reuse else fresh

    def _with_replayed(self, number: int, fresh: Drawn) -> Drawn:
        """The same with what is used again behind it, and rollouts without a signal where a run has fewer of them."""
        size = self._train.group_size
        more = size * max(reuse.most for reuse in self._reuse.values())
        if not more:
            return fresh
        names = [one.name for one in fields(Drawn)]
        wide = Drawn(*(_widened(getattr(fresh, name), more) for name in names))
        for run, reuse in self._reuse.items():
            for place, group in enumerate(reuse.replayed(number), start=self._train.groups_per_step):
                own = slice(place * size, (place + 1) * size)
                wide.versions[run, own], wide.weights[run, own] = group.version, group.weight
                for name in PARTS:
                    getattr(wide, name)[run, own] = getattr(group, name)
        return wide

    # -- a train step ------------------------------------------------------------------------------------------------

    def step(self, number: int, drawn: Drawn) -> Tensor:
        """Trains every run on its rollouts. [S, 4]: KL and effective share against the behaviour policy, share of
        masked tokens, entropy; NaN where nothing was to be learned."""
        count, length = drawn.rewards.shape[0], drawn.replies.shape[2]
        ask = torch.full((*drawn.rewards.shape, 1), self._ask)
        rows = torch.cat([drawn.prompts, ask, drawn.replies[..., :-1]], 2)
        weights = self.weights.clone().requires_grad_()
        log_probs = self._policies.log_probs(weights, rows, length)
        logp = log_probs.gather(3, drawn.replies[..., None])[..., 0]
        collision = log_probs.detach().exp().square().sum(-1)
        signal = self._signal(drawn.rewards)
        masked = torch.zeros_like(drawn.behaviour)
        losses, rates = [], torch.zeros(count, 1)
        for one in self._losses:
            own = one.runs
            losses.append(one.loss(number, drawn, signal[own], logp[own], collision[own], masked[own]))
            log_s = (logp.detach()[own] - drawn.behaviour[own]).sum(2)
            rates[own] = one.rates(number, log_s, signal[own])
        (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), weights)
        self._adamw(gradient, signal.any(1), rates)
        with torch.no_grad():
            self._settle(number, drawn, logp - drawn.behaviour, signal)
            return _told(logp - drawn.behaviour, masked, log_probs, signal)

    def _settle(self, number: int, drawn: Drawn, log_ratio: Tensor, signal: Tensor) -> None:
        size, count = self._train.group_size, self._train.groups_per_step
        for run, reuse in self._reuse.items():
            ratios = log_ratio[run, count * size :][signal[run, count * size :]].exp()
            ess = float(ratios.sum() ** 2 / (ratios.numel() * ratios.square().sum())) if ratios.numel() else None
            reuse.settle(number, [drawn.group(run, place, size) for place in range(count)], ess)

    def _signal(self, rewards: Tensor) -> Tensor:
        """[S, R] whether a rollout's group has a signal."""
        size = self._train.group_size
        groups = rewards.reshape(-1, size).tolist()
        return torch.tensor([has_signal(group) for group in groups]).repeat_interleave(size).view(rewards.shape)

    def _adamw(self, gradient: Tensor, active: Tensor, rates: Tensor) -> None:
        """AdamW of each seed that has a gradient, after its norm was bounded; the others stay as they are."""
        train, (first, second) = self._train, self._moments
        gradient = gradient * (train.max_grad_norm / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        self._taken += active
        whose = active[:, None]
        first.copy_(torch.where(whose, first.lerp(gradient, 1 - BETAS[0]), first))
        second.copy_(torch.where(whose, second.lerp(gradient.square(), 1 - BETAS[1]), second))
        biases = [1 - beta ** self._taken.clamp(min=1.0)[:, None] for beta in BETAS]
        move = (first / biases[0]) / ((second / biases[1]).sqrt() + EPSILON) + train.weight_decay * self.weights
        # Not in place: older versions stay what they were.
        self.weights = torch.where(whose, self.weights - rates * move, self.weights)


def _widened(tensor: Tensor, more: int) -> Tensor:
    """[S, R + more, ...] with zeros behind."""
    return torch.cat([tensor, tensor.new_zeros(len(tensor), more, *tensor.shape[2:])], 1)


def _told(log_ratio: Tensor, masked: Tensor, log_probs: Tensor, signal: Tensor) -> Tensor:
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    rows = torch.stack([log_ratio.exp() - 1 - log_ratio, masked, entropy]).mean(3)
    kl, hidden, spread = torch.where(signal, rows, 0.0).sum(2) / signal.sum(1)
    logs = log_ratio.sum(2).double().masked_fill(~signal, -math.inf)
    ess = (2 * logs.logsumexp(1) - (2 * logs).logsumexp(1)).exp() / signal.sum(1)
    return torch.stack([kl.double(), ess, hidden.double(), spread.double()], 1)
