"""What is trained on: the segments of rollouts as token sequences, each token with all that the learner knows of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longshore.types import Rollout, SampledSpan, Segment


@dataclass(frozen=True)
class TrainSequence:
    """One segment, ready for the learner. Lists are [L], one entry a token, prefix included; where a token was not
    sampled, what they say of it counts for nothing.

    Example: prompt 5 6, reply 7 8 with log-probs -0.5 and -0.1, advantage 1:
        token_ids [5, 6, 7, 8]  sampled [F, F, T, T]  behaviour [0, 0, -0.5, -0.1]  advantages [0, 0, 1, 1]
    """

    # Position of its rollout in the batch: what belongs to one rollout has the same.
    rollout: int
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


def sequences_of(
    rollout: Rollout, advantages_S: Sequence[float], weight: float = 1.0, position: int = 0
) -> list[TrainSequence]:
    """The trainable sequences of one rollout: each segment behind its parent's prefix, which carries no loss twice.

    Args:
        rollout: any, with sampled tokens or without.
        advantages_S: one a sampled token, in the order of the segments.
        weight: of each of its tokens in the batch's loss.
        position: of the rollout in the batch.
    """
    if len(advantages_S) != rollout.num_sampled:
        raise ValueError(f"{len(advantages_S)} advantages for {rollout.num_sampled} sampled tokens")
    by_id = {segment.segment_id: segment for segment in rollout.segments}
    advantages = iter(advantages_S)
    return [_sequence(rollout, segment, by_id, advantages, weight, position) for segment in rollout.segments]


def _sequence(
    rollout: Rollout,
    segment: Segment,
    by_id: dict[str, Segment],
    advantages: Iterator[float],
    weight: float,
    position: int,
) -> TrainSequence:
    prefix = _prefix(segment, by_id)
    length = len(prefix) + len(segment.token_ids)
    made = TrainSequence(
        rollout=position,
        token_ids=[*prefix, *segment.token_ids],
        sampled=[False] * length,
        behaviour=[0.0] * length,
        temperature=[1.0] * length,
        versions=[-1] * length,
        turns=[-1] * length,
        advantages=[0.0] * length,
        weights=[0.0] * length,
    )
    start = len(prefix)
    for span in segment.spans:
        end = start + span.length
        if isinstance(span, SampledSpan):
            made.sampled[start:end] = [True] * span.length
            made.behaviour[start:end] = span.logprobs
            made.temperature[start:end] = [rollout.sampling[span.sampling_index].temperature] * span.length
            made.versions[start:end] = [span.version] * span.length
            made.advantages[start:end] = [next(advantages) for _ in range(span.length)]
            made.weights[start:end] = [weight] * span.length
        start = end
    for number, turn in enumerate(rollout.turns):
        if turn.segment_id == segment.segment_id:
            start = len(prefix) + turn.start
            made.turns[start : start + turn.length] = [number] * turn.length
    return made


def _prefix(segment: Segment, by_id: dict[str, Segment]) -> list[int]:
    # From the nearest parent to the first; a chain may be longer than Python's stack.
    parts: list[tuple[int, ...]] = []
    while segment.parent_segment_id is not None:
        parent = by_id[segment.parent_segment_id]
        parts.append(parent.token_ids[: segment.prefix_len])
        segment = parent
    return [token for part in reversed(parts) for token in part]
