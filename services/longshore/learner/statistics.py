"""Numbers about a batch of groups, before any tensor is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from longshore.learner.credit.group import has_signal, mean_of
from longshore.learner.groups import Group, LateMember
from longshore.learner.health import AGE_EDGES, LENGTH_EDGES, bucket_names, bucket_of
from longshore.types import FinishReason, Rollout


def rewards_of(group: Group) -> list[float]:
    """[G] rewards of the group's rollouts, by index."""
    return [reward_of(rollout) for _, rollout in group.members]


def reward_of(rollout: Rollout) -> float:
    """What a scored rollout earned."""
    assert rollout.verdict is not None, "intake takes in scored rollouts only"
    return rollout.verdict.reward


def rollouts_of(groups: Sequence[Group], late: Sequence[LateMember]) -> list[Rollout]:
    """Every rollout of a batch, in its order."""
    return [rollout for group in groups for _, rollout in group.members] + [member.rollout for member in late]


def staleness_of(groups: Sequence[Group], late: Sequence[LateMember], version: int) -> list[int]:
    """Versions published since each rollout's oldest token, when it is consumed by the step after `version`."""
    return [version - rollout.min_version for rollout in rollouts_of(groups, late)]


def batch_metrics(groups: Sequence[Group], late: Sequence[LateMember], version: int) -> dict[str, float]:
    """The metrics of a batch that need no model; names as the field has them. Of what is trained on for the first
    time: a replayed rollout says nothing new."""
    rollouts = rollouts_of(groups, late)
    rewards = [reward_of(rollout) for rollout in rollouts]
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
        **means_by_bucket("reward/by_staleness", staleness, rewards, AGE_EDGES),
        **means_by_bucket("reward/by_length", lengths, rewards, LENGTH_EDGES),
        **_by_site(_sites_of(groups, late), staleness),
    }


def means_by_bucket(name: str, values: Iterable[int], means: Iterable[float], edges: Sequence[int]) -> dict[str, float]:
    """Mean of `means` over those whose value falls in each bucket, under `name/bucket`; empty buckets are left out.

    Example: means_by_bucket("r", [0, 2, 3], [1.0, 0.0, 0.5], (0, 1, 4)) == {"r/0": 1.0, "r/1-3": 0.25}
    """
    found: dict[int, list[float]] = {}
    for value, mean in zip(values, means, strict=True):
        found.setdefault(bucket_of(value, edges), []).append(mean)
    names = bucket_names(edges)
    return {f"{name}/{names[bucket]}": mean_of(found[bucket]) for bucket in sorted(found)}


def _sites_of(groups: Sequence[Group], late: Sequence[LateMember]) -> list[str]:
    # As the delivery says, which was checked; not as the rollout does.
    own = [group.sites.get(index, "home") for group in groups for index, _ in group.members]
    return [*own, *(member.site for member in late)]


def _by_site(sites: Sequence[str], staleness: Sequence[int]) -> dict[str, float]:
    found: dict[str, float] = {}
    for site in sorted(set(sites)):
        own = [age for age, of in zip(staleness, sites, strict=True) if of == site]
        found[f"off_policy/mean_by_site/{site}"] = sum(own) / len(own)
        found[f"off_policy/max_by_site/{site}"] = float(max(own))
    return found
