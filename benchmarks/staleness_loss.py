"""What one job of a staleness world makes of its rollouts: the learner's credit, objective and normalisation, for many
runs of it at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from benchmarks.staleness_reuse import Group
from longshore.config import TrainSpec
from longshore.config_credit import AnyCredit, GroupMean, GroupMeanStd, LeaveOneOut, SoftValue
from longshore.learner.credit.group import above_soft_value, centred, leave_one_out, standardised
from longshore.learner.objectives.normalise import Totals, scales
from longshore.learner.objectives.registry import build_objective
from longshore.learner.objectives.tokens import TokenBatch
from longshore.learner.objectives.variance import optimal_baseline, squared_gradients, step_scale


@dataclass(frozen=True)
class Drawn:
    """The rollouts of one train step: S runs, R rollouts each in groups that follow each other, L tokens each."""

    # [S, R] each; weights are of each token in the batch's loss.
    versions: Tensor
    weights: Tensor
    # [S, R, L], [S, R, L], [S, R, L], [S, R]
    prompts: Tensor
    replies: Tensor
    behaviour: Tensor
    rewards: Tensor

    def group(self, run: int, place: int, size: int) -> Group:
        """The group at a place of a run's batch."""
        own = slice(place * size, (place + 1) * size)
        parts = (getattr(self, name)[run, own] for name in PARTS)
        return Group(int(self.versions[run, own.start]), float(self.weights[run, own.start]), *parts)


PARTS = ("prompts", "replies", "behaviour", "rewards")


class Loss:
    """What one `train` makes of the rollouts of its runs."""

    def __init__(self, train: TrainSpec, runs: slice) -> None:
        self.runs = runs
        self._train = train
        self._objective = build_objective(train.objective)
        self._rule = credit_rule(train.credit)

    def loss(
        self, number: int, drawn: Drawn, signal: Tensor, logp: Tensor, collision: Tensor, masked: Tensor
    ) -> Tensor:
        """The sum of the losses of its s runs, a scalar.

        Args:
            number: train step.
            drawn: of all jobs' runs.
            signal: [s, R] whether a rollout's group has a signal.
            logp: [s, R, L] with gradients.
            collision: [s, R, L]
            masked: [s, R, L] is told what was masked.
        """
        behaviour = drawn.behaviour[self.runs]
        kept = signal[..., None].expand(behaviour.shape)
        if not bool(kept.any()):
            return logp.sum() * 0.0
        runs, rollouts, length = behaviour.shape
        # [N] of the tokens that carry loss: their row among all, and their run.
        sequences = torch.arange(runs * rollouts).view(runs, rollouts, 1).expand(behaviour.shape)[kept]
        owners = sequences // rollouts
        tokens = TokenBatch(
            logp=logp[kept],
            behaviour=behaviour[kept],
            advantages=self._advantages(drawn.rewards[self.runs])[..., None].expand(behaviour.shape)[kept],
            sequences=sequences,
            ages=(number - 1 - drawn.versions[self.runs])[..., None].expand(behaviour.shape)[kept],
            keep=torch.ones(len(sequences), dtype=torch.bool),
        )
        tokens = self._as_a_whole(tokens, owners, collision[kept])
        result = self._objective.loss(tokens)
        masked[kept] = result.masked.to(masked.dtype)
        counts = torch.bincount(owners, minlength=runs).tolist()
        weights = drawn.weights[self.runs][..., None].expand(behaviour.shape)[kept]
        return (result.loss * weights * self._scales(counts, length)[owners]).sum()

    def rates(self, number: int, log_s: Tensor, signal: Tensor) -> Tensor:
        """[s, 1] learning rates of a step."""
        train = self._train
        warm = min(1.0, number / train.warmup_steps) if train.warmup_steps else 1.0
        rates = torch.full((len(log_s), 1), train.learning_rate * warm)
        if train.ess_step is not None:
            for run, row in enumerate(log_s):
                rates[run] *= step_scale(row[signal[run]], train.ess_step)
        return rates

    def _advantages(self, rewards: Tensor) -> Tensor:
        groups = rewards.reshape(-1, self._train.group_size).tolist()
        return torch.tensor([self._rule(group) for group in groups]).view(rewards.shape)

    def _as_a_whole(self, tokens: TokenBatch, owners: Tensor, collision: Tensor) -> TokenBatch:
        """What the objective and VCPO's baseline work out over the batch of each run."""
        train = self._train
        keep, advantages = tokens.keep, tokens.advantages
        if self._objective.keep is not None:
            for run in owners.unique().tolist():
                own = owners == run
                part = TokenBatch(*(getattr(tokens, name)[own] for name in _STREAMS))
                keep[own] = self._objective.keep(part)
        if train.optimal_baseline is not None:
            norms = squared_gradients(tokens.logp.detach(), collision)
            groups = tokens.sequences // train.group_size if train.optimal_baseline == "group" else owners
            advantages = optimal_baseline(advantages, tokens.log_ratio.detach(), norms, tokens.sequences, groups)
        return replace(tokens, keep=keep, advantages=advantages)

    def _scales(self, counts: Sequence[int], length: int) -> Tensor:
        """[s] factor of each token of a run with so many tokens."""
        return torch.tensor([self._scale(count, length) for count in counts])

    @cache  # noqa: B019
    def _scale(self, count: int, length: int) -> float:
        totals = Totals(count, torch.full((max(1, count // length),), length))
        return float(scales(self._train.objective.normalise, torch.zeros(1, dtype=torch.long), totals, length))


_STREAMS = ("logp", "behaviour", "advantages", "sequences", "ages", "keep")


def credit_rule(spec: AnyCredit) -> Callable[[Sequence[float]], list[float]]:
    """From a group's rewards to its advantages."""
    if isinstance(spec, SoftValue):
        return lambda rewards: above_soft_value(rewards, spec.temperature)
    rules = {GroupMean: centred, GroupMeanStd: standardised, LeaveOneOut: leave_one_out}
    return rules[type(spec)]
