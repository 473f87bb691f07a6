"""From the groups of one train step to the tensors that a forward pass takes.

A rollout's segments become sequences; a token of a sampled span carries its behaviour log-prob, its temperature and
its rollout's advantage. Right padding needs no attention mask under causal attention: nothing real looks at it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longshore.types import GivenSpan, Rollout, Segment


@dataclass(frozen=True)
class TrainSequence:
    """One segment, ready for the learner. Lists are [L], one entry a token, prefix included.

    Example: prompt 5 6, reply 7 8 with log-probs -0.5 and -0.1:
        token_ids [5, 6, 7, 8]  sampled [F, F, T, T]  behaviour [0, 0, -0.5, -0.1]
    """

    token_ids: list[int]
    sampled: list[bool]
    behaviour: list[float]
    temperature: list[float]
    versions: list[int]
    advantage: float


@dataclass(frozen=True)
class MicroBatch:
    """Sequences padded to one length, and the sampled tokens among them in reading order.

    `rows`/`columns` point at the position *before* each sampled token: the one whose logits predicted it.
    """

    # [B, T]
    input_ids: Tensor
    # [N] each
    rows: Tensor
    columns: Tensor
    targets: Tensor
    behaviour: Tensor
    temperature: Tensor
    advantages: Tensor
    versions: Tensor


def sequences_of(rollout: Rollout, advantage: float) -> list[TrainSequence]:
    """The trainable sequences of one rollout: each segment behind its parent's prefix, which carries no loss twice."""
    by_id = {segment.segment_id: segment for segment in rollout.segments}
    return [_sequence(rollout, segment, by_id, advantage) for segment in rollout.segments]


def _sequence(rollout: Rollout, segment: Segment, by_id: dict[str, Segment], advantage: float) -> TrainSequence:
    prefix = _prefix(segment, by_id)
    sampled = [False] * len(prefix)
    behaviour, temperature, versions = [0.0] * len(prefix), [1.0] * len(prefix), [-1] * len(prefix)
    for span in segment.spans:
        if isinstance(span, GivenSpan):
            sampled += [False] * span.length
            behaviour += [0.0] * span.length
            temperature += [1.0] * span.length
            versions += [-1] * span.length
        else:
            sampled += [True] * span.length
            behaviour += span.logprobs
            temperature += [rollout.sampling[span.sampling_index].temperature] * span.length
            versions += [span.version] * span.length
    return TrainSequence([*prefix, *segment.token_ids], sampled, behaviour, temperature, versions, advantage)


def _prefix(segment: Segment, by_id: dict[str, Segment]) -> list[int]:
    # From the nearest parent to the first; a chain may be longer than Python's stack.
    parts: list[tuple[int, ...]] = []
    while segment.parent_segment_id is not None:
        parent = by_id[segment.parent_segment_id]
        parts.append(parent.token_ids[: segment.prefix_len])
        segment = parent
    return [token for part in reversed(parts) for token in part]


def micro_batches(sequences: Sequence[TrainSequence], max_tokens: int) -> Iterator[MicroBatch]:
    """Packs sequences of similar length together, at most `max_tokens` padded tokens each (a longer one alone).

    The order is a function of the sequences alone, so a replayed step adds up its gradients in the same order.
    """
    ordered = sorted(sequences, key=lambda sequence: len(sequence.token_ids))
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and (end - start + 1) * len(ordered[end].token_ids) <= max_tokens:
            end += 1
        yield _collate(ordered[start:end])
        start = end


def _collate(sequences: Sequence[TrainSequence]) -> MicroBatch:
    longest = max(len(sequence.token_ids) for sequence in sequences)
    input_ids = torch.zeros((len(sequences), longest), dtype=torch.long)
    places: list[tuple[int, int]] = []
    streams: list[tuple[int, float, float, float, int]] = []
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
        for column, is_sampled in enumerate(sequence.sampled):
            # The first token of a sequence has nothing before it to be predicted from.
            if is_sampled and column > 0:
                places.append((row, column - 1))
                streams.append(
                    (
                        sequence.token_ids[column],
                        sequence.behaviour[column],
                        sequence.temperature[column],
                        sequence.advantage,
                        sequence.versions[column],
                    )
                )
    rows, columns = torch.tensor(places, dtype=torch.long).reshape(-1, 2).unbind(1)
    targets, behaviour, temperature, advantages, versions = zip(*streams, strict=True) if streams else ((),) * 5
    return MicroBatch(
        input_ids=input_ids,
        rows=rows,
        columns=columns,
        targets=torch.tensor(targets, dtype=torch.long),
        behaviour=torch.tensor(behaviour, dtype=torch.float32),
        temperature=torch.tensor(temperature, dtype=torch.float32),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        versions=torch.tensor(versions, dtype=torch.long),
    )
