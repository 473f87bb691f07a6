"""The tasks of the staleness benchmark: small enough for hundreds of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Game:
    """A task whose answer is a function of its prompt: symbols in, as many symbols out."""

    name: str
    symbols: int
    length: int
    # "reverse": from its end to its beginning; "sort": in order of size; "sums": each the sum of those up to it, modulo
    # the number of symbols.
    answer: Literal["reverse", "sort", "sums"]
    # What an answer earns: the share of symbols before its first wrong one, or 1 when all are right and else 0.
    pays: Literal["prefix", "whole"]
    # Mean reward that counts as learned.
    target: float
    # At which on-policy runs take more than a thousand train steps.
    learning_rate: float

    @property
    def prompts(self) -> Tensor:
        """[P, length] all there are."""
        return torch.cartesian_prod(*[torch.arange(self.symbols)] * self.length)

    def answers(self, prompts: Tensor) -> Tensor:
        """[..., length] of [..., length]."""
        if self.answer == "sort":
            return prompts.sort(dim=-1).values
        return prompts.flip(-1) if self.answer == "reverse" else prompts.cumsum(-1) % self.symbols

    def rewards(self, prompts: Tensor, replies: Tensor) -> Tensor:
        """[...] of [..., length] each."""
        return self.earned((self.answers(prompts) == replies).double())

    def earned(self, chances: Tensor) -> Tensor:
        """[...] expected rewards of [..., length] chances that a symbol is right, given that those before it are."""
        so_far = chances.cumprod(-1)
        return so_far.mean(-1) if self.pays == "prefix" else so_far[..., -1]


GAMES = (
    # Learned in a hundred steps: for a quick look.
    Game("pair", symbols=4, length=2, answer="reverse", pays="prefix", target=0.85, learning_rate=3e-3),
    Game("sort", symbols=4, length=3, answer="sort", pays="whole", target=0.8, learning_rate=7e-4),
    # On-policy runs come to rest at 0.7 to 0.8 here: they have settled on a part of the prompts.
    Game("sums", symbols=4, length=3, answer="sums", pays="prefix", target=0.7, learning_rate=4.5e-4),
)
