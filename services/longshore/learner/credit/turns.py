"""Credit within a rollout: by turns, by the states that turns were taken in, by single tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from longshore.config_credit import Gigpo, ProcessRewards, TurnRewards
from longshore.learner.credit.group import EPSILON, centred, deviation_of, mean_of, standardised
from longshore.learner.credit.members import Member, last_tokens, rewards_to_tokens


def outcome_advantages(rewards_G: Sequence[float], std: bool) -> list[float]:
    """[G] of the outcomes alone."""
    return standardised(rewards_G) if std else centred(rewards_G)


def turn_level(members_G: Sequence[Member], spec: TurnRewards) -> list[list[float]]:
    """[G][S] advantages of turns by their own rewards.

        A_{i,k} = A^O_i + weight * A^T_{i,k}  for every turn k but the rollout's last;   A_{i,K} = A^O_i

    A^O: the outcome against the group's; A^T: the reward of turn k against those of the others' turn k. The last turn
    answers for the outcome alone. Source: MT-GRPO, arXiv 2505.11821 (there for two turns).
    """
    outcome = outcome_advantages([member.reward for member in members_G], spec.std)
    by_turn: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for i, member in enumerate(members_G):
        for k, reward in enumerate(member.turn_rewards[:-1]):
            by_turn[k].append((i, reward))
    own: dict[tuple[int, int], float] = {}
    for k, pairs in by_turn.items():
        advantages = outcome_advantages([reward for _, reward in pairs], spec.std)
        own.update({(i, k): advantage for (i, _), advantage in zip(pairs, advantages, strict=True)})
    return [
        [outcome[i] + spec.weight * own.get((i, k), 0.0) for k in member.turn_of] for i, member in enumerate(members_G)
    ]


def gigpo(members_G: Sequence[Member], spec: Gigpo) -> list[list[float]]:
    """[G][S] advantages of turns by what came of the same state elsewhere in the group.

        A_{i,k} = A^E_i + weight * A^S_{i,k}
        R_{i,k} = sum_{l >= k} gamma^(l - k) r_{i,l}

    A^E: the outcome against the group's; A^S: R_{i,k} against those of all turns of the group that were taken in the
    same (anchor) state; 0 where no other was, or where the environment names no state. r are the turns' rewards, or
    without any the outcome at the last turn. Source: GiGPO, arXiv 2505.10978.
    """
    episode = outcome_advantages([member.reward for member in members_G], spec.std)
    by_state: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
    for i, member in enumerate(members_G):
        count = len(member.states)
        rewards = list(member.turn_rewards) or [0.0] * (count - 1) + [member.reward] * (count > 0)
        returns = discounted(rewards, spec.gamma)
        for k, state in enumerate(member.states):
            if state is not None:
                by_state[state].append((i, k, returns[k]))
    own: dict[tuple[int, int], float] = {}
    for entries in by_state.values():
        advantages = outcome_advantages([value for _, _, value in entries], spec.std)
        own.update({(i, k): advantage for (i, k, _), advantage in zip(entries, advantages, strict=True)})
    return [
        [episode[i] + spec.weight * own.get((i, k), 0.0) for k in member.turn_of] for i, member in enumerate(members_G)
    ]


def process(members_G: Sequence[Member], spec: ProcessRewards) -> list[list[float]]:
    """[G][S] advantages from rewards inside the rollouts: each token gets what comes at it and after it.

        A_{i,t} = outcome * A^O_i + sum_{j >= t} gamma^(steps between) x_{i,j}
        x_{i,j} = (r_{i,j} - mean(r)) / (std(r) + 1e-6)  over all rewarded tokens of the group

    Rewarded is every token where the verifier gave token rewards, else the last token of each turn that has a reward;
    gamma discounts from one rewarded token to the next. Source: GRPO's process supervision, arXiv 2402.03300, section
    4.1.3 (gamma 1, outcome 0), with discounting.
    """
    outcome = outcome_advantages([member.reward for member in members_G], spec.std)
    rewarded = [_rewarded(member) for member in members_G]
    rewards = [rewards_to_tokens(member) for member in members_G]
    pool = [rewards[i][token] for i, tokens in enumerate(rewarded) for token in tokens]
    mean, scale = mean_of(pool), (deviation_of(pool) + EPSILON if spec.std else 1.0)
    advantages: list[list[float]] = []
    for i, member in enumerate(members_G):
        steps = set(rewarded[i])
        ahead, row = 0.0, [0.0] * len(member.turn_of)
        for token in reversed(range(len(row))):
            if token in steps:
                ahead = (rewards[i][token] - mean) / scale + spec.gamma * ahead
            row[token] = spec.outcome * outcome[i] + ahead
        advantages.append(row)
    return advantages


def _rewarded(member: Member) -> list[int]:
    if member.token_rewards:
        return list(range(len(member.token_rewards)))
    return last_tokens(member.turn_of) if member.turn_rewards else []


def discounted(rewards: Sequence[float], gamma: float) -> list[float]:
    """R_k = sum_{l >= k} gamma^(l - k) r_l. Example: discounted([0.0, 0.0, 1.0], 0.5) == [0.25, 0.5, 1.0]"""
    returns, ahead = [0.0] * len(rewards), 0.0
    for k in reversed(range(len(rewards))):
        ahead = rewards[k] + gamma * ahead
        returns[k] = ahead
    return returns
