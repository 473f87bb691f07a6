"""What credit is worked out from: each rollout of a batch, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longshore.config_credit import OverlongSpec
from longshore.learner.credit.group import Baseline, overlong_penalty
from longshore.types import Rollout, SampledSpan

# The state before a rollout's first turn: the same for all of a group.
FIRST_STATE = ""


@dataclass(frozen=True)
class Member:
    """One rollout: what is known of each sampled token, in the order of the segments, and of each turn.

    Example: two turns of two tokens and one, the second rewarded by itself:
        Member(reward=1.0, turn_of=(0, 0, 1), turn_rewards=(0.0, 0.5), states=("", "a1"))
    """

    reward: float
    # Index of the token's turn; -1: of none.
    turn_of: tuple[int, ...]
    # Empty: the verifier gave none.
    turn_rewards: tuple[float, ...] = ()
    token_rewards: tuple[float, ...] = ()
    # The environment's name for the state in which each turn was taken; None: it has none.
    states: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Cohort:
    """Rollouts that are compared with each other: a group; or one late member, with those that came before it."""

    members: tuple[Member, ...]
    # Set: this is a late member, and these are the rewards of the group that it belongs to.
    baseline: Baseline | None = None

    @property
    def rewards(self) -> list[float]:
        return [member.reward for member in self.members]


def member_of(rollout: Rollout, overlong: OverlongSpec | None) -> Member:
    """A scored rollout in numbers.

    An environment names the state that it is in after a turn by a text in that turn's info, under "state".
    """
    verdict = rollout.verdict
    assert verdict is not None, "intake takes in scored rollouts only"
    reward = verdict.reward
    if overlong is not None:
        reward += overlong_penalty(rollout.num_sampled, overlong.limit, overlong.buffer, overlong.penalty)
    after = [turn.info.get("state") for turn in rollout.turns]
    return Member(
        reward,
        _turns_of(rollout),
        verdict.turn_rewards,
        verdict.token_rewards,
        tuple([FIRST_STATE, *[state if isinstance(state, str) else None for state in after]][: len(rollout.turns)]),
    )


def _turns_of(rollout: Rollout) -> tuple[int, ...]:
    turns: list[int] = []
    for segment in rollout.segments:
        places = [-1] * len(segment.token_ids)
        for number, turn in enumerate(rollout.turns):
            if turn.segment_id == segment.segment_id:
                places[turn.start : turn.start + turn.length] = [number] * turn.length
        start = 0
        for span in segment.spans:
            if isinstance(span, SampledSpan):
                turns += places[start : start + span.length]
            start += span.length
    return tuple(turns)


def rewards_to_tokens(member: Member) -> list[float]:
    """[S] the rewards inside the rollout, each at the token at which it was earned: token rewards where there are any,
    else each turn's at its last token, else none. The outcome is not among them."""
    if member.token_rewards:
        return list(member.token_rewards)
    rewards = [0.0] * len(member.turn_of)
    for token in last_tokens(member.turn_of):
        if member.turn_rewards:
            rewards[token] = member.turn_rewards[member.turn_of[token]]
    return rewards


def last_tokens(turn_of: Sequence[int]) -> list[int]:
    """Positions of the last token of each turn that has one."""
    return sorted({turn: position for position, turn in enumerate(turn_of) if turn >= 0}.values())
