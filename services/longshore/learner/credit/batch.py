"""Credit of a batch, by the kind that the JobSpec names: rollouts in, sequences with an advantage a token out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longshore.config import TrainSpec
from longshore.config_credit import (
    AnyCredit,
    BatchWhitened,
    Gae,
    Gigpo,
    GroupMean,
    GroupMeanStd,
    LeaveOneOut,
    ProcessRewards,
    SoftValue,
    TurnRewards,
)
from longshore.learner.credit.group import (
    EPSILON,
    ZERO_VARIANCE,
    Baseline,
    above_soft_value,
    centred,
    leave_one_out,
    soft_value,
    standardised,
)
from longshore.learner.credit.members import Cohort, Member, member_of, rewards_to_tokens
from longshore.learner.credit.turns import gigpo, process, turn_level
from longshore.learner.sequences import Credit, TrainSequence, sequences_of
from longshore.types import Rollout

# [cohort][G][S]
Advantages = list[list[list[float]]]


@dataclass(frozen=True)
class Again:
    """A group that was trained on before."""

    rollouts: Sequence[Rollout]
    # Which training on it this is, from 2.
    use: int
    # Of each of its tokens in the batch's loss.
    weight: float


@dataclass(frozen=True)
class CreditedBatch:
    """What one train step is taken on, and which parts of the batch have a gradient at all."""

    sequences: list[TrainSequence]
    # One a group and one a late member, in the batch's order.
    signals: list[bool]
    late_signals: list[bool]
    # [group][G] what the members are taken to have earned.
    rewards: list[list[float]]
    # [R] ids of the rollouts whose sequences these are, by `TrainSequence.rollout`.
    rollout_ids: list[str]


def credit_batch(
    groups: Sequence[Sequence[Rollout]],
    late: Sequence[tuple[Rollout, Baseline]],
    train: TrainSpec,
    again: Sequence[Again] = (),
) -> CreditedBatch:
    """Credits the rollouts of a batch. A group, or a late member, without a single advantage other than 0 is left out:
    it has no gradient. With a value head every rollout is kept: there is a value to be learned from it.

    Args:
        groups: the scored rollouts of each group.
        late: scored rollouts whose groups were trained on before, each with what its group earned then.
        train: the kind of credit, and what long rollouts lose.
        again: groups that are replayed; they are credited like the others.
    """
    cohorts = [Cohort(tuple(member_of(rollout, train.overlong) for rollout in group)) for group in groups]
    cohorts += [Cohort((member_of(rollout, train.overlong),), baseline) for rollout, baseline in late]
    cohorts += [Cohort(tuple(member_of(rollout, train.overlong) for rollout in group.rollouts)) for group in again]
    spec = train.credit
    advantages = None if isinstance(spec, Gae) else credit(cohorts, spec)
    sequences: list[TrainSequence] = []
    signals: list[bool] = []
    ids: list[str] = []
    fresh = [Again(rollouts, 1, 1.0) for rollouts in [*groups, *([rollout] for rollout, _ in late)]]
    for number, group in enumerate([*fresh, *again]):
        if advantages is None:
            own = [_to_be_valued(member, group.weight) for member in cohorts[number].members]
        else:
            own = [Credit(row, weight=group.weight) for row in advantages[number]]
        signals.append(advantages is None or _any_signal(advantages[number]))
        if signals[-1]:
            for rollout, credited in zip(group.rollouts, own, strict=True):
                sequences += sequences_of(rollout, credited, len(ids), number, group.use)
                ids.append(rollout.ref.key)
    rewards = [cohort.rewards for cohort in cohorts[: len(groups)]]
    return CreditedBatch(sequences, signals[: len(groups)], signals[len(groups) : len(fresh)], rewards, ids)


def group_has_signal(rollouts: Sequence[Rollout], train: TrainSpec) -> bool:
    """Whether `credit_batch` would keep a group, which must not depend on the rest of its batch.

    Raises:
        ValueError: with this kind of credit it does.
    """
    if isinstance(train.credit, BatchWhitened):
        raise ValueError("advantages are whitened over the batch")
    cohort = Cohort(tuple(member_of(rollout, train.overlong) for rollout in rollouts))
    return _any_signal(credit([cohort], train.credit)[0])


def _to_be_valued(member: Member, weight: float) -> Credit:
    rewards = rewards_to_tokens(member)
    if rewards:
        rewards[-1] += member.reward
    return Credit([0.0] * len(rewards), rewards, weight)


def _any_signal(advantages: Sequence[Sequence[float]]) -> bool:
    return any(abs(value) > ZERO_VARIANCE for row in advantages for value in row)


def credit(cohorts: Sequence[Cohort], spec: AnyCredit) -> Advantages:
    """Advantages of every sampled token of a batch: [cohort][G][S].

    A late member is compared with the rewards of the members that its group was trained with. Those are outcomes, so
    kinds that compare turns or tokens across the group give it an advantage by its outcome alone.
    """
    if isinstance(spec, Gae):
        raise ValueError("gae needs the value head's answer: the trainer works it out")
    if isinstance(spec, BatchWhitened):
        return whitened(cohorts, spec)
    return [_late(cohort, spec) if cohort.baseline is not None else _group(cohort, spec) for cohort in cohorts]


def _group(cohort: Cohort, spec: AnyCredit) -> list[list[float]]:
    if isinstance(spec, TurnRewards):
        return turn_level(cohort.members, spec)
    if isinstance(spec, Gigpo):
        return gigpo(cohort.members, spec)
    if isinstance(spec, ProcessRewards):
        return process(cohort.members, spec)
    advantages = _outcome_rule(spec)(cohort.rewards)
    return [_constant(advantage, member) for advantage, member in zip(advantages, cohort.members, strict=True)]


def _outcome_rule(spec: AnyCredit) -> Callable[[Sequence[float]], list[float]]:
    if isinstance(spec, GroupMean):
        return centred
    if isinstance(spec, GroupMeanStd):
        return standardised
    if isinstance(spec, LeaveOneOut):
        return leave_one_out
    assert isinstance(spec, SoftValue)
    temperature = spec.temperature
    return lambda rewards_G: above_soft_value(rewards_G, temperature)


def _late(cohort: Cohort, spec: AnyCredit) -> list[list[float]]:
    assert cohort.baseline is not None
    return [_constant(late_advantage(member.reward, cohort.baseline, spec), member) for member in cohort.members]


def late_advantage(reward: float, baseline: Baseline, spec: AnyCredit) -> float:
    """Advantage of one late member against those that were trained before it.

    Members that were all alike say nothing about the scale of rewards: then the plain difference counts.
    """
    if isinstance(spec, SoftValue):
        return reward - soft_value(baseline.rewards, spec.temperature)
    difference = reward - baseline.mean
    divides = isinstance(spec, GroupMeanStd) or (isinstance(spec, (TurnRewards, Gigpo, ProcessRewards)) and spec.std)
    if isinstance(spec, ProcessRewards):
        difference *= spec.outcome
    return difference / (baseline.deviation + EPSILON) if divides and baseline.deviation > ZERO_VARIANCE else difference


def whitened(cohorts: Sequence[Cohort], spec: BatchWhitened) -> Advantages:
    """Rewards in standard deviations from the batch's mean, both taken over all sampled tokens of the batch.

        A_t = (x_t - mean(x)) / (std(x) + 1e-6),   x_t = R_i, or R_i - mean of the group with `group_baseline`

    Source: REINFORCE++, arXiv 2501.03262 (the group baseline is its variant for groups). Without rewards inside a
    rollout and gamma 1, the return of every token is the outcome. A batch of equal rewards has advantages of 0.
    """
    raw = [
        [member.reward - (_group_mean(cohort) if spec.group_baseline else 0.0) for member in cohort.members]
        for cohort in cohorts
    ]
    members = [member for cohort in cohorts for member in cohort.members]
    values = [value for row in raw for value in row]
    counts = [len(member.turn_of) for member in members]
    total = max(1, sum(counts))
    mean = math.fsum(value * count for value, count in zip(values, counts, strict=True)) / total
    variance = math.fsum((value - mean) ** 2 * count for value, count in zip(values, counts, strict=True)) / total
    deviation = math.sqrt(variance)
    scale = 0.0 if deviation <= ZERO_VARIANCE else 1.0 / (deviation + EPSILON)
    return [
        [_constant((value - mean) * scale, member) for value, member in zip(row, cohort.members, strict=True)]
        for row, cohort in zip(raw, cohorts, strict=True)
    ]


def _group_mean(cohort: Cohort) -> float:
    return (cohort.baseline or Baseline(tuple(cohort.rewards))).mean


def _constant(advantage: float, member: Member) -> list[float]:
    return [advantage] * len(member.turn_of)
