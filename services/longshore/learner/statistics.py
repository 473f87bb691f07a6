"""Numbers about a batch of groups, before any tensor is made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from longshore.learner.credit.group import has_signal
from longshore.learner.groups import Group, LateMember
from longshore.types import FinishReason, Rollout


def rewards_of(group: Group) -> list[float]:
    """[G] rewards of the group's rollouts, by index."""
    rewards = []
    for _, rollout in group.members:
        assert rollout.verdict is not None, "intake takes in scored rollouts only"
        rewards.append(rollout.verdict.reward)
    return rewards


def rollouts_of(groups: Sequence[Group], late: Sequence[LateMember]) -> list[Rollout]:
    """Every rollout of a batch, in its order."""
    return [rollout for group in groups for _, rollout in group.members] + [member.rollout for member in late]


def staleness_of(groups: Sequence[Group], late: Sequence[LateMember], version: int) -> list[int]:
    """Versions published since each rollout's oldest token, when it is consumed by the step after `version`."""
    return [version - rollout.min_version for rollout in rollouts_of(groups, late)]


def batch_metrics(groups: Sequence[Group], late: Sequence[LateMember], version: int) -> dict[str, float]:
    """The metrics of a batch that need no model; names as the field has them."""
    rollouts = rollouts_of(groups, late)
    rewards = [rollout.verdict.reward for rollout in rollouts if rollout.verdict is not None]
    staleness = staleness_of(groups, late, version)
    lengths = [rollout.num_sampled for rollout in rollouts]
    mean = math.fsum(rewards) / len(rewards)
    return {
        "reward/mean": mean,
        "reward/std": math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)),
        "reward/max": max(rewards),
        "reward/min": min(rewards),
        "reward/zero_std_frac": sum(not has_signal(rewards_of(group)) for group in groups) / len(groups),
        "off_policy/mean": sum(staleness) / len(staleness),
        "off_policy/max": float(max(staleness)),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(rollout.finish is FinishReason.LENGTH for rollout in rollouts) / len(rollouts),
        "rollouts": float(len(rollouts)),
        "rollouts/late": float(len(late)),
        "tokens/sampled": float(sum(lengths)),
    }
