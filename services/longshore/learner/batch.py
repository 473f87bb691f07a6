"""From the sequences of one train step to packs: what a forward pass takes at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longshore.learner.sending import sent
from longshore.learner.sequences import TrainSequence
from longshore.learner.streams import TokenStreams, sampled_columns, streams_of
from longshore.learner.token_tree import Ints, TokenTree, plant


@dataclass(frozen=True)
class MicroBatch:
    """Sequences laid out in one pack, and the sampled tokens among them in reading order.

    `places` points at the place *before* each sampled token: the one whose logits predicted it. Where sequences part,
    one place predicts several tokens.
    """

    tree: TokenTree
    # [N] each
    places: Tensor
    targets: Tensor
    streams: TokenStreams

    def to(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on a device; the tree stays where it is."""
        streams = TokenStreams(**{name: sent(value, device) for name, value in vars(self.streams).items()})
        return dataclasses.replace(
            self, places=sent(self.places, device), targets=sent(self.targets, device), streams=streams
        )


def micro_batches(sequences: Sequence[TrainSequence], max_tokens: int) -> Iterator[MicroBatch]:
    """Packs sequences together, at most `max_tokens` places each (a longer sequence alone), without padding.

    The order is a function of the sequences alone, so a replayed step adds up its gradients in the same order. A
    sequence without a sampled token is left out, and so is what stands behind the last one.
    """
    columns = [sampled_columns(sequence) for sequence in sequences]
    trained = [number for number, at in enumerate(columns) if at.size]
    # The last sampled token itself is predicted, and predicts nothing.
    needed = [sequences[number].token_ids[: int(columns[number][-1])] for number in trained]
    for tree in plant(needed, max_tokens):
        members = [trained[member] for member in tree.members]
        yield _collate(tree, [(number, sequences[number]) for number in members], [columns[n] for n in members])


def _collate(tree: TokenTree, numbered: Sequence[tuple[int, TrainSequence]], columns: Sequence[Ints]) -> MicroBatch:
    before = [places[at - 1] for places, at in zip(tree.places, columns, strict=True)]
    targets = [np.asarray(sequence.token_ids)[at] for (_, sequence), at in zip(numbered, columns, strict=True)]
    return MicroBatch(
        tree=tree,
        places=torch.from_numpy(np.concatenate(before)),
        targets=torch.from_numpy(np.concatenate(targets)),
        streams=streams_of(numbered),
    )
