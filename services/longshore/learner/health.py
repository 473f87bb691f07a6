"""How the tokens of a step stand to the policy: importance weights, effective sample size and what the trust region
left, by the age of the tokens, and of what was replayed apart. Sums over forward passes; no wait for a GPU in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longshore.learner.objectives.tokens import ratio_of

# Versions published since a token's own, and sampled tokens of a rollout: the first number of each bucket.
AGE_EDGES = (0, 1, 4, 16, 64, 256)
LENGTH_EDGES = (0, 16, 64, 256, 1024, 4096, 16_384, 65_536)


def bucket_names(edges: Sequence[int]) -> list[str]:
    """Example: bucket_names((0, 1, 4)) == ["0", "1-3", "4+"]"""
    lasts = [first - 1 for first in edges[1:]]
    named = [str(first) if first == last else f"{first}-{last}" for first, last in zip(edges, lasts, strict=False)]
    return [*named, f"{edges[-1]}+"]


def bucket_of(value: int, edges: Sequence[int]) -> int:
    """Number of the bucket that a value falls in; `edges` ascend from 0."""
    return max(0, sum(value >= edge for edge in edges) - 1)


class TokenHealth:
    """Sums over the tokens of one step. Each row of `_sums` is [buckets + 1]: the ages, and all that was replayed."""

    # How many `numbers` are.
    NUMBERS = 4 * (len(AGE_EDGES) + 1)

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, log_ratio: Tensor, ages: Tensor, masked: Tensor, again: Tensor | None) -> None:
        """Takes in a forward pass.

        Args:
            log_ratio: [N] log r_t.
            ages: [N] versions published since the token's own.
            masked: [N] bool; True: its policy gradient was taken away.
            again: [N] bool, whether the token's rollout was trained on before; None: none was.
        """
        ratio = ratio_of(log_ratio.detach().double())
        rows = torch.stack([torch.ones_like(ratio), ratio, ratio.square(), (~masked).to(ratio.dtype)])
        edges = torch.tensor(AGE_EDGES, device=ages.device)
        buckets = (torch.bucketize(ages, edges, right=True) - 1).clamp(min=0)
        sums = rows.new_zeros(len(rows), len(AGE_EDGES) + 1)
        sums[:, :-1].index_add_(1, buckets, rows)
        if again is not None:
            sums[:, -1] = (rows * again).sum(dim=1)
        self._sums = sums if self._sums is None else self._sums + sums

    def numbers(self) -> Tensor:
        """[NUMBERS] float64 on the CPU, for another process's `take_in`."""
        if self._sums is None:
            return torch.zeros(self.NUMBERS, dtype=torch.float64)
        return self._sums.cpu().reshape(-1)

    def take_in(self, numbers: Tensor) -> None:
        """Adds what other passes have come to."""
        sums = numbers.view(4, -1)
        self._sums = sums if self._sums is None else self._sums + sums

    def metrics(self) -> dict[str, float]:
        """For each bucket that has tokens, and for `replay/`: their number, the mean importance weight, the share of
        tokens whose gradient was kept, and the effective share rho = (sum r)^2 / (N sum r^2) of the tokens."""
        if self._sums is None:
            return {}
        found: dict[str, float] = {}
        names = [*(f"age/{name}/{{}}" for name in bucket_names(AGE_EDGES)), "replay/{}"]
        for name, (tokens, ratios, squares, kept) in zip(names, self._sums.T.tolist(), strict=True):
            if tokens:
                found[name.format("tokens")] = tokens
                found[name.format("is_ratio")] = ratios / tokens
                found[name.format("kept_frac")] = kept / tokens
                found[name.format("ess")] = ratios**2 / (tokens * squares)
        return found
