"""The canary: what proves that an engine computes with the weights of the version that it is about to serve.

Each manifest holds log-probs that the learner computed in float32, with the weights as published, for fixed tokens. The
engine scores the same tokens with the weights that it has loaded; an engine that computes in float32 too differs by the
order of its sums alone. So a tensor that was not replaced, or replaced by another's, shows, however it came about.
Knows neither engines nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longshore.errors import IntegrityError
from longshore.weights.client import CanaryProbe

# [len - 1] log-probs at temperature 1 of each token after the first, given those before it.
Score = Callable[[Sequence[int]], Sequence[float]]


@dataclass(frozen=True)
class Gap:
    """How far an engine's log-probs are from the learner's, in nats.

    Example: Gap(largest=3e-6, mean=1e-6)
    """

    largest: float
    mean: float


# Most that may be seen of a right version, by the dtype that the engine computes in. float32: both sides sum the same
# numbers in another order, which has given up to 1e-4. In half precision every activation is rounded, to 8 bits of
# bfloat16 and 11 of float16: a logit of 32 then comes in steps of 0.25 and 0.03. bfloat16 has given 0.27 on SmolLM2
# (mean 0.04); the bounds are three times that, and an eighth of it for float16.
BOUNDS = {
    "float32": Gap(largest=2e-3, mean=2e-3),
    "float16": Gap(largest=0.1, mean=0.02),
    "bfloat16": Gap(largest=0.8, mean=0.12),
}


@dataclass(frozen=True)
class Proof:
    """What a version's manifest says of its log-probs.

    Example: Proof((CanaryProbe((5, 6, 7), (-1.5, -0.25)),))
    """

    canaries: tuple[CanaryProbe, ...]

    def check(self, vocab_size: int) -> None:
        """Raises IntegrityError for a proof that no engine of this model could give."""
        if not any(canary.logprobs for canary in self.canaries):
            raise IntegrityError("the version has no canary to prove it by")
        if not all(0 <= token < vocab_size for canary in self.canaries for token in canary.token_ids):
            raise IntegrityError("a canary's tokens are not in the model's vocabulary")

    def gap(self, score: Score) -> Gap:
        """Scores every canary; infinite where a log-prob is no number.

        `score` may leave the end of a canary out that is longer than the engine's context.
        """
        gaps = [
            abs(ours - theirs)
            for canary in self.canaries
            for ours, theirs in zip(score(canary.token_ids), canary.logprobs, strict=False)
        ]
        if not gaps or not all(map(math.isfinite, gaps)):
            return Gap(math.inf, math.inf)
        return Gap(max(gaps), sum(gaps) / len(gaps))


def holds(gap: Gap, dtype: str) -> bool:
    """Whether a gap is what rounding explains, in an engine that computes in `dtype` (one of BOUNDS)."""
    bound = BOUNDS[dtype]
    return gap.largest <= bound.largest and gap.mean <= bound.mean


def demand(gap: Gap, dtype: str) -> None:
    """Raises IntegrityError unless the gap holds."""
    if not holds(gap, dtype):
        bound = BOUNDS[dtype]
        raise IntegrityError(
            f"a canary's log-probs are off by {gap.largest:.3g} (mean {gap.mean:.3g}); at most {bound.largest} "
            f"(mean {bound.mean}) is right in {dtype}"
        )
