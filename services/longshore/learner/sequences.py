"""What is trained on: the segments of rollouts as token sequences, each token with all that the learner knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longshore.types import KvMark, Rollout, SampledSpan, Segment


@dataclass(frozen=True)
class TrainSequence:
    """One segment, ready for the learner. Lists are [L], one entry a token, prefix included; where a token was not
    sampled, what they say of it counts for nothing.

    Example: prompt 5 6, reply 7 8 with log-probs -0.5 and -0.1, advantage 1:
        token_ids [5, 6, 7, 8]  sampled [F, F, T, T]  behaviour [0, 0, -0.5, -0.1]  advantages [0, 0, 1, 1]
    """

    # Positions of its rollout and of its group in the batch: what belongs to one of them has the same.
    rollout: int
    group: int
    token_ids: list[int]
    sampled: list[bool]
    behaviour: list[float]
    temperature: list[float]
    versions: list[int]
    # Index into the rollout's turns; -1: of none.
    turns: list[int]
    advantages: list[float]
    # How much a token counts beside the others: 1 for most.
    weights: list[float]
    # What was earned at the token: for a value head, from which advantages are then made.
    rewards: list[float]
    # Whether it was drawn with a KV cache that older weights had begun.
    carried: list[bool]
    # Which training on its rollout this is, from 1.
    use: int = 1


@dataclass(frozen=True)
class Credit:
    """What a rollout's tokens are credited with. Lists are [S]: one a sampled token, in the order of the segments."""

    advantages: Sequence[float]
    rewards: Sequence[float] = ()
    # Of each of its tokens in the batch's loss.
    weight: float = 1.0


def sequences_of(
    rollout: Rollout, credit: Credit, position: int = 0, group: int = 0, use: int = 1
) -> list[TrainSequence]:
    """The trainable sequences of one rollout: each segment behind its parent's prefix, which carries no loss twice.

    Args:
        rollout: any, with sampled tokens or without.
        credit: of its tokens; rewards can be left out.
        position: of the rollout in the batch.
        group: position of its group in the batch.
        use: which training on the rollout this is.
    """
    count = rollout.num_sampled
    if len(credit.advantages) != count or len(credit.rewards) not in (0, count):
        raise ValueError(
            f"{len(credit.advantages)} advantages and {len(credit.rewards)} rewards for {count} sampled tokens"
        )
    by_id = {segment.segment_id: segment for segment in rollout.segments}
    made: list[TrainSequence] = []
    used = 0
    for segment in rollout.segments:
        sequence = _empty(_prefix(segment, by_id), segment, position, group, use)
        used = _fill(sequence, rollout, segment, credit, used)
        made.append(sequence)
    return made


def _empty(prefix: list[int], segment: Segment, position: int, group: int, use: int) -> TrainSequence:
    length = len(prefix) + len(segment.token_ids)
    return TrainSequence(
        rollout=position,
        group=group,
        token_ids=[*prefix, *segment.token_ids],
        sampled=[False] * length,
        behaviour=[0.0] * length,
        temperature=[1.0] * length,
        versions=[-1] * length,
        turns=[-1] * length,
        advantages=[0.0] * length,
        weights=[0.0] * length,
        rewards=[0.0] * length,
        carried=[False] * length,
        use=use,
    )


def _fill(made: TrainSequence, rollout: Rollout, segment: Segment, credit: Credit, used: int) -> int:
    """Writes down what is known of a segment's sampled tokens. `used` of the rollout's stand before it; returns how
    many do with it."""
    before = len(made.token_ids) - len(segment.token_ids)
    start = before
    for span in segment.spans:
        end = start + span.length
        if isinstance(span, SampledSpan):
            made.sampled[start:end] = [True] * span.length
            made.behaviour[start:end] = span.logprobs
            made.temperature[start:end] = [rollout.sampling[span.sampling_index].temperature] * span.length
            made.versions[start:end] = [span.version] * span.length
            made.advantages[start:end] = credit.advantages[used : used + span.length]
            made.weights[start:end] = [credit.weight] * span.length
            made.carried[start:end] = [span.kv is KvMark.CARRIED] * span.length
            if credit.rewards:
                made.rewards[start:end] = credit.rewards[used : used + span.length]
            used += span.length
        start = end
    for number, turn in enumerate(rollout.turns):
        if turn.segment_id == segment.segment_id:
            start = before + turn.start
            made.turns[start : start + turn.length] = [number] * turn.length
    return used


def _prefix(segment: Segment, by_id: dict[str, Segment]) -> list[int]:
    # From the nearest parent to the first; a chain may be longer than Python's stack.
    parts: list[tuple[int, ...]] = []
    while segment.parent_segment_id is not None:
        parent = by_id[segment.parent_segment_id]
        parts.append(parent.token_ids[: segment.prefix_len])
        segment = parent
    return [token for part in reversed(parts) for token in part]
