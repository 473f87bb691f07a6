"""From the sequences of one train step to the tensors that a forward pass takes.

Right padding needs no attention mask under causal attention: nothing real looks at it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longshore.learner.sequences import TrainSequence
from longshore.learner.streams import TokenStreams, streams_of


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
    streams: TokenStreams


def micro_batches(sequences: Sequence[TrainSequence], max_tokens: int) -> Iterator[MicroBatch]:
    """Packs sequences of similar length together, at most `max_tokens` padded tokens each (a longer one alone).

    The order is a function of the sequences alone, so a replayed step adds up its gradients in the same order.
    """
    ordered = sorted(enumerate(sequences), key=lambda pair: len(pair[1].token_ids))
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and (end - start + 1) * len(ordered[end][1].token_ids) <= max_tokens:
            end += 1
        yield _collate(ordered[start:end])
        start = end


def _collate(numbered: Sequence[tuple[int, TrainSequence]]) -> MicroBatch:
    longest = max(len(sequence.token_ids) for _, sequence in numbered)
    input_ids = torch.zeros((len(numbered), longest), dtype=torch.long)
    places: list[tuple[int, int, int]] = []
    for row, (_, sequence) in enumerate(numbered):
        input_ids[row, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
        # The first token of a sequence has nothing before it to be predicted from.
        places += [
            (row, column - 1, sequence.token_ids[column])
            for column in range(1, len(sequence.token_ids))
            if sequence.sampled[column]
        ]
    rows, columns, targets = torch.tensor(places, dtype=torch.long).reshape(-1, 3).unbind(1)
    return MicroBatch(input_ids, rows, columns, targets, streams_of(numbered))
