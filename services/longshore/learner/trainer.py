"""One optimizer step on one batch: tensors in, new weights and numbers out. Knows no broker and no versions' names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longshore.config import TrainSpec
from longshore.learner.batch import MicroBatch, micro_batches
from longshore.learner.objective import ObjectiveFn, build_objective
from longshore.learner.sequences import TrainSequence

# Padded tokens of one forward pass: bounds memory, not what is learned.
MICRO_BATCH_TOKENS = 16_384


@dataclass
class StepSums:
    """Sums over the sampled tokens of one step, from which the means in `metrics` are made."""

    tokens: int = 0
    loss: float = 0.0
    entropy: float = 0.0
    masked: float = 0.0
    kl: float = 0.0
    ratio: float = 0.0
    ratio_max: float = 0.0
    same_version_tokens: int = 0
    same_version_kl: float = 0.0


class Trainer:
    """Policy, optimizer and schedule. `step` is deterministic: same state and batch, same bits (on CPU)."""

    def __init__(self, policy: torch.nn.Module, spec: TrainSpec) -> None:
        self.policy = policy
        self.spec = spec
        self.objective: ObjectiveFn = build_objective(spec.objective)
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay, betas=(0.9, 0.95)
        )

    def learning_rate(self, step: int) -> float:
        """Rate of train step `step` (from 1): linear warm-up, then constant or linear to the final rate."""
        spec = self.spec
        warm = min(1.0, step / spec.warmup_steps) if spec.warmup_steps else 1.0
        if spec.final_learning_rate is None:
            return spec.learning_rate * warm
        progress = (step - 1) / max(1, spec.steps - 1)
        return warm * (spec.learning_rate + (spec.final_learning_rate - spec.learning_rate) * progress)

    def step(self, number: int, sequences: Sequence[TrainSequence], policy_version: int) -> dict[str, float]:
        """Trains on one batch and returns its metrics. A batch without a single loss token changes nothing.

        Args:
            number: train step, from 1.
            sequences: what to train on; the loss is the mean over all their sampled tokens.
            policy_version: version of the weights before this step, to tell equal-version tokens.
        """
        total = sum(sum(sequence.sampled) for sequence in sequences)
        sums = StepSums()
        rate = self.learning_rate(number)
        if total == 0:
            return self._metrics(sums, 0.0, rate)
        self.policy.train()
        self.optimizer.zero_grad(set_to_none=True)
        for micro in micro_batches(sequences, MICRO_BATCH_TOKENS):
            self._accumulate(micro, total, policy_version, sums)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.spec.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if torch.isfinite(norm):
            # A step whose gradient is not a number would end the run; it is skipped, and optim/skipped says so.
            self.optimizer.step()
        return self._metrics(sums, float(norm), rate)

    def _accumulate(self, micro: MicroBatch, total: int, policy_version: int, sums: StepSums) -> None:
        logp, entropy = token_logprobs(self.policy, micro)
        streams = micro.streams
        result = self.objective(logp, streams.behaviour, streams.advantages)
        ((result.loss * streams.weights).sum() / total).backward()
        with torch.no_grad():
            log_ratio = logp - streams.behaviour
            ratio = log_ratio.exp()
            kl = ratio - 1 - log_ratio
            same = streams.versions == policy_version
            sums.tokens += logp.numel()
            sums.loss += float(result.loss.sum())
            sums.entropy += float(entropy.sum())
            sums.masked += float(result.masked.sum())
            sums.kl += float(kl.sum())
            sums.ratio += float(ratio.sum())
            sums.ratio_max = max(sums.ratio_max, float(ratio.max()))
            sums.same_version_tokens += int(same.sum())
            sums.same_version_kl += float(kl[same].sum())

    def _metrics(self, sums: StepSums, norm: float, rate: float) -> dict[str, float]:
        tokens = max(1, sums.tokens)
        metrics = {
            "loss/policy": sums.loss / tokens,
            "policy/entropy": sums.entropy / tokens,
            "policy/masked_frac": sums.masked / tokens,
            "mismatch_kl/mean": sums.kl / tokens,
            "is_ratio/mean": sums.ratio / tokens,
            "is_ratio/max": sums.ratio_max,
            "optim/lr": rate,
            "optim/grad_norm": norm if norm == norm else 0.0,
            "optim/skipped": float(norm != norm or norm == float("inf")),
            "perf/trained_tokens": float(sums.tokens),
        }
        if sums.same_version_tokens:
            metrics["mismatch_kl/same_version"] = sums.same_version_kl / sums.same_version_tokens
        return metrics


def token_logprobs(policy: torch.nn.Module, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """[N] log-probs of the sampled tokens under `policy` at the temperature they were drawn with, and [N] entropies.

    Logits are made only where a sampled token was predicted, in float32.
    """
    hidden = policy.model(input_ids=micro.input_ids, use_cache=False).last_hidden_state
    logits = policy.lm_head(hidden[micro.rows, micro.columns]).float() / micro.streams.temperature[:, None]
    log_probs = functional.log_softmax(logits, dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).detach()
    return log_probs.gather(1, micro.targets[:, None]).squeeze(1), entropy


def canary_logprobs(policy: torch.nn.Module, token_ids: Sequence[int]) -> list[float]:
    """[len - 1] log-probs of each token after the first, given those before it, at temperature 1."""
    policy.eval()
    ids = torch.tensor([list(token_ids)])
    with torch.no_grad():
        log_probs = functional.log_softmax(policy(input_ids=ids).logits[0, :-1].float(), dim=-1)
        return [float(value) for value in log_probs.gather(1, ids[0, 1:, None]).squeeze(1)]
