"""Objectives once more, in plain Python floats, one token after another: what the tensor functions are tested against.

Written from the formulas, not from the code. `logp` is what is differentiated, `still` the same numbers where a formula
stops the gradient, so that a finite difference in `logp` is the gradient that autograd should give.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LIMIT = 20.0


@dataclass(frozen=True)
class Tokens:
    """A batch as lists, one entry a token."""

    logp: list[float]
    still: list[float]
    mu: list[float]
    advantage: list[float]
    sequence: list[int]
    age: list[int]
    anchor: list[float] | None = None

    def mates(self, t: int) -> list[int]:
        return [j for j in range(len(self.logp)) if self.sequence[j] == self.sequence[t]]


def ratio(log: float) -> float:
    return math.exp(min(LIMIT, max(-LIMIT, log)))


def cap(log: float, most: float) -> float:
    return most if log > math.log(most) else math.exp(log)


def bound(value: float, low: float, high: float) -> float:
    return min(high, max(low, value))


def still_log(b: Tokens, t: int) -> float:
    return b.still[t] - b.mu[t]


def still_sum(b: Tokens, t: int) -> float:
    return sum(still_log(b, j) for j in b.mates(t))


def reinforce(b: Tokens, t: int, spec: Any) -> float:
    log = still_log(b, t) if spec.level == "token" else still_sum(b, t)
    return -cap(log, spec.ratio_cap) * b.advantage[t] * b.logp[t]


def cispo(b: Tokens, t: int, spec: Any) -> float:
    weight = bound(ratio(still_log(b, t)), 1 - spec.clip_low, 1 + spec.clip_high)
    return -weight * b.advantage[t] * b.logp[t]


def icepop(b: Tokens, t: int, spec: Any) -> float:
    weight = ratio(still_log(b, t))
    return -weight * b.advantage[t] * b.logp[t] if spec.low <= weight <= spec.high else 0.0


def sequence_mask(b: Tokens, t: int, spec: Any) -> float:
    logs = [still_log(b, j) for j in b.mates(t)]
    if spec.statistic == "product":
        statistic = ratio(sum(logs))
    elif spec.statistic == "geometric":
        statistic = ratio(sum(logs) / len(logs))
    else:
        statistic = sum(ratio(log) - log - 1 for log in logs) / len(logs)
    low, high = spec.bounds
    if not low <= statistic <= high or any(ratio(log) < spec.veto for log in logs):
        return 0.0
    return -cap(still_log(b, t), spec.ratio_cap) * b.advantage[t] * b.logp[t]


def topr(b: Tokens, t: int, spec: Any) -> float:
    weight = 1.0 if b.advantage[t] > 0 else cap(still_sum(b, t), spec.negative_cap)
    return -weight * b.advantage[t] * b.logp[t]


def vespo(b: Tokens, t: int, spec: Any) -> float:
    good = b.advantage[t] >= 0
    k, lam = (spec.k_positive, spec.lambda_positive) if good else (spec.k_negative, spec.lambda_negative)
    log_s = still_sum(b, t)
    kernel = math.exp(lam + k * log_s - lam * ratio(log_s))
    return -kernel * b.advantage[t] * b.logp[t]


def _surrogate(u: float, advantage: float, low: float, high: float) -> float:
    return -min(u * advantage, bound(u, 1 - low, 1 + high) * advantage)


def clip(b: Tokens, t: int, spec: Any) -> float:
    r = ratio(b.logp[t] - b.mu[t])
    if spec.two_sided is not None:
        r = min(r, spec.two_sided)
    loss = _surrogate(r, b.advantage[t], spec.clip_low, spec.clip_high)
    if spec.dual_clip is not None and b.advantage[t] < 0:
        loss = min(loss, -spec.dual_clip * b.advantage[t])
    return loss


def gspo(b: Tokens, t: int, spec: Any) -> float:
    s = ratio(still_sum(b, t) / len(b.mates(t))) * math.exp(b.logp[t] - b.still[t])
    return _surrogate(s, b.advantage[t], spec.clip_low, spec.clip_high)


def _decoupled(b: Tokens, t: int, anchor: float, spec: Any) -> float:
    weight = ratio(anchor - b.mu[t])
    if weight > spec.weight_cap:
        return 0.0
    return weight * _surrogate(ratio(b.logp[t] - anchor), b.advantage[t], spec.clip_low, spec.clip_high)


def decoupled_ppo(b: Tokens, t: int, spec: Any) -> float:
    return _decoupled(b, t, b.still[t] if b.anchor is None else b.anchor[t], spec)


def a3po(b: Tokens, t: int, spec: Any) -> float:
    share = (b.age[t] - 1) / b.age[t] if b.age[t] >= 1 else 0.0
    return _decoupled(b, t, b.mu[t] + share * still_log(b, t), spec)


def kept_by_second_moment(b: Tokens, threshold: float) -> list[bool]:
    """Takes the largest away, one at a time, until the mean of the others is below the threshold."""
    left = list(range(len(b.logp)))
    while left and sum(still_log(b, j) ** 2 for j in left) / len(left) >= threshold:
        left.remove(max(left, key=lambda j: (still_log(b, j) ** 2, j)))
    return [j in left for j in range(len(b.logp))]


def m2po(b: Tokens, t: int, spec: Any) -> float:
    if not kept_by_second_moment(b, spec.threshold)[t]:
        return 0.0
    return -ratio(b.logp[t] - b.mu[t]) * b.advantage[t]


def sapo(b: Tokens, t: int, spec: Any) -> float:
    tau = spec.tau_positive if b.advantage[t] > 0 else spec.tau_negative
    exponent = -tau * (ratio(b.logp[t] - b.mu[t]) - 1)
    gate = 1 / (1 + math.exp(exponent)) if exponent < 700 else 0.0
    return -4 / tau * gate * b.advantage[t]


def dppo(b: Tokens, t: int, spec: Any) -> float:
    moved = math.exp(b.still[t]) - math.exp(b.mu[t])
    gap = spec.max_probability_gap
    outside = (b.advantage[t] > 0 and moved > gap) or (b.advantage[t] < 0 and moved < -gap)
    policy = 0.0 if outside else -cap(still_log(b, t), spec.ratio_cap) * b.advantage[t] * b.logp[t]
    return policy + spec.quadratic * (b.logp[t] - b.mu[t]) ** 2


def kimi(b: Tokens, t: int, spec: Any) -> float:
    if spec.level == "token":
        square = (b.logp[t] - b.mu[t]) ** 2
    else:
        mates = b.mates(t)
        square = sum(b.logp[j] - b.mu[j] for j in mates) ** 2 / len(mates)
    return -b.advantage[t] * b.logp[t] + spec.tau / 2 * square


def oapl(b: Tokens, t: int, spec: Any) -> float:
    mates = b.mates(t)
    log_s = sum(b.logp[j] - b.mu[j] for j in mates)
    advantage = sum(b.advantage[j] for j in mates) / len(mates)
    return (spec.beta * log_s - advantage) ** 2 / len(mates)


REFERENCES: dict[str, Callable[[Tokens, int, Any], float]] = {
    "dppo": dppo,
    "reinforce": reinforce,
    "rloo": reinforce,
    "clip": clip,
    "grpo": clip,
    "dr-grpo": clip,
    "dapo": clip,
    "reinforce++": clip,
    "gspo": gspo,
    "cispo": cispo,
    "decoupled-ppo": decoupled_ppo,
    "a-3po": a3po,
    "topr": topr,
    "m2po": m2po,
    "icepop": icepop,
    "sequence-mask": sequence_mask,
    "sapo": sapo,
    "kimi": kimi,
    "oapl": oapl,
    "vespo": vespo,
}


def losses(b: Tokens, spec: Any) -> list[float]:
    """[N] the loss of each token."""
    return [REFERENCES[spec.name](b, t, spec) for t in range(len(b.logp))]
