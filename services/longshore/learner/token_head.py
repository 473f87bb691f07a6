"""Log-probs and entropies of tokens from hidden states, without the [tokens, vocabulary] matrix, forward or backward.

Logits are made for as many tokens at a time as a bound in bytes allows, in float32, and made again when the gradient is
asked for; where all of them fit in the bound they are kept instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Bytes of float32 logits at a time: near a CPU's cache; on a GPU enough rows for a matrix product at full speed.
CPU_LOGITS_BYTES = 64 * 2**20
CUDA_LOGITS_BYTES = 4 * 2**30


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, max_bytes: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """[N] log-probs of `targets` under p = softmax(hidden @ weight.T / temperature), [N] entropies and [N] sums of p^2.

    In float32; only the log-probs carry a gradient.

    Args:
        hidden: [N, E] the state that predicts each token.
        weight: [V, E] the output embedding, of the same dtype.
        targets: [N] token ids.
        temperature: [N] float32, of each token's sampling.
        max_bytes: bound on the float32 logits that exist at a time.
    """
    if max_bytes is None:
        max_bytes = CUDA_LOGITS_BYTES if hidden.is_cuda else CPU_LOGITS_BYTES
    rows = max(1, max_bytes // (4 * weight.shape[0]))
    made: tuple[Tensor, Tensor, Tensor] = _TokenLogprobs.apply(hidden, weight, targets, temperature, rows)
    return made


class _TokenLogprobs(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        logp, entropy, collision, log_sum = (torch.empty_like(temperature) for _ in range(4))
        logits = None
        for chunk in _chunks(targets.shape[0], rows):
            logits = _logits(hidden[chunk], weight)
            made = _fused(statistics)(logits, targets[chunk], temperature[chunk])
            logp[chunk], entropy[chunk], collision[chunk], log_sum[chunk] = made
        kept = logits if logits is not None and targets.shape[0] <= rows else None
        ctx.save_for_backward(hidden, weight, targets, temperature, log_sum, kept)
        ctx.rows = rows
        ctx.mark_non_differentiable(entropy, collision)
        return logp, entropy, collision

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, temperature, log_sum, kept = ctx.saved_tensors
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Many small numbers are added up: in float32 whatever the weights are.
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(targets.shape[0], ctx.rows):
            logits = _logits(hidden[chunk], weight) if kept is None else kept
            for_logits = _fused(logits_gradient)(
                logits, targets[chunk], temperature[chunk], log_sum[chunk], grad[chunk], weight.dtype
            )
            if for_hidden is not None:
                torch.mm(for_logits, weight, out=for_hidden[chunk])
            if for_weight is None:
                continue
            if weight.dtype == torch.float32:
                for_weight.addmm_(for_logits.t(), hidden[chunk])
            else:
                for_weight += torch.mm(for_logits.t(), hidden[chunk])
        return for_hidden, None if for_weight is None else for_weight.to(weight.dtype), None, None, None


def _chunks(length: int, rows: int) -> list[slice]:
    # Of like size: a short last chunk would be a slow matrix product.
    number = max(1, -(-length // rows))
    size = max(1, -(-length // number))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[n, V] float32, also from halves: their products are added up in float32 and not rounded after."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return torch.mm(hidden, weight.t()).float()


def statistics(logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[n] log-probs of the targets, entropies, sums of p^2, log-sum-exps of the [n, V] logits over the temperature."""
    cooled = logits * temperature.reciprocal()[:, None]
    largest = cooled.amax(-1)
    # Two passes over the logits: one for the largest, one for every sum.
    below = cooled.sub_(largest[:, None])
    picked = below.gather(1, targets[:, None]).squeeze(1)
    shares = below.exp()
    total, squares = shares.sum(-1), shares.square().sum(-1)
    log_total = total.log()
    entropy = log_total - below.mul_(shares).sum(-1) / total
    return picked - log_total, entropy, squares / total.square(), largest + log_total


def logits_gradient(
    logits: Tensor, targets: Tensor, temperature: Tensor, log_sum: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """[n, V] gradient of sum(grad * log-prob of the target): (1 at the target - probability) * grad / temperature.

    Made in float32 and returned in `dtype`.
    """
    share = (grad / temperature)[:, None]
    if logits.is_cuda:
        # One pass when compiled; the difference is taken in float32, where a likely token's is not rounded away.
        probability = (logits * temperature.reciprocal()[:, None] - log_sum[:, None]).exp()
        at_target = torch.arange(logits.shape[1], device=logits.device)[None] == targets[:, None]
        return ((at_target.float() - probability) * share).to(dtype)
    made = (logits * temperature.reciprocal()[:, None]).sub_(log_sum[:, None]).exp_().mul_(-share)
    return made.scatter_add_(1, targets[:, None], share).to(dtype)


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one or two passes over the logits on CUDA, where memory is what they wait for.

    It is compiled once for any number of tokens: after two of them the compiler takes that for what changes.
    """

    def on_either(logits: Tensor, *others: Any) -> Any:
        return _compiled(function)(logits, *others) if logits.is_cuda else function(logits, *others)

    return on_either


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled
