"""What a forward pass need not know, and an objective must: the streams of the sampled tokens, one entry a token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longshore.learner.sequences import TrainSequence


@dataclass(frozen=True)
class TokenStreams:
    """[N] each: the sampled tokens of some sequences in reading order, sequence by sequence.

    The first token of a sequence is left out: it has nothing before it to be predicted from.
    """

    # What the engine recorded when it drew the token: log-prob, temperature, policy version.
    behaviour: Tensor
    temperature: Tensor
    versions: Tensor
    advantages: Tensor
    weights: Tensor
    rewards: Tensor
    # The token's sequence, as numbered by the caller: all of a sequence's tokens are in one forward pass.
    sequences: Tensor
    # The token's group and rollout, as numbered in the batch, and its turn there (-1: of none).
    groups: Tensor
    rollouts: Tensor
    turns: Tensor
    # Whether the token was drawn with a KV cache that older weights had begun.
    carried: Tensor

    @staticmethod
    def joined(parts: Sequence[TokenStreams]) -> TokenStreams:
        """The streams of several forward passes behind each other."""
        names = [field.name for field in fields(TokenStreams)]
        return TokenStreams(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def sampled_columns(sequence: TrainSequence) -> NDArray[np.int64]:
    """Where in a sequence its sampled tokens stand, the first token left out."""
    # Through bytes: five times as fast as from a list of flags.
    columns = np.flatnonzero(np.frombuffer(bytes(sequence.sampled), dtype=np.uint8))
    return columns[columns > 0]


def streams_of(numbered: Iterable[tuple[int, TrainSequence]]) -> TokenStreams:
    """The streams of sequences in the given order, each with its number in the batch."""
    pairs = list(numbered)
    columns = [sampled_columns(sequence) for _, sequence in pairs]

    def stream(values: Iterable[Sequence[float]], dtype: torch.dtype) -> Tensor:
        parts = [np.asarray(value)[at] for value, at in zip(values, columns, strict=True)]
        return torch.from_numpy(np.concatenate(parts)).to(dtype) if parts else torch.empty(0, dtype=dtype)

    def repeated(values: Iterable[int]) -> Tensor:
        counts = [at.size for at in columns]
        return torch.from_numpy(np.repeat(np.array(list(values), dtype=np.int64), np.array(counts, dtype=np.int64)))

    sequences = [sequence for _, sequence in pairs]
    return TokenStreams(
        behaviour=stream((one.behaviour for one in sequences), torch.float32),
        temperature=stream((one.temperature for one in sequences), torch.float32),
        versions=stream((one.versions for one in sequences), torch.long),
        advantages=stream((one.advantages for one in sequences), torch.float32),
        weights=stream((one.weights for one in sequences), torch.float32),
        rewards=stream((one.rewards for one in sequences), torch.float32),
        sequences=repeated(number for number, _ in pairs),
        groups=repeated(one.group for one in sequences),
        rollouts=repeated(one.rollout for one in sequences),
        turns=stream((one.turns for one in sequences), torch.long),
        carried=stream((one.carried for one in sequences), torch.bool),
    )
