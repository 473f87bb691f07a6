"""The loss of one batch: what lies between the log-probs of its tokens and the gradient.

A batch is computed in several passes (micro-batches). What depends on the batch as a whole is worked out before the
first gradient: the scales of normalisation from counts alone, masks and baselines from a preview of the log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from longshore.config import TrainSpec
from longshore.config_credit import Gae
from longshore.learner.health import TokenHealth
from longshore.learner.objectives.kl import kl_term
from longshore.learner.objectives.normalise import Totals, scales
from longshore.learner.objectives.registry import Objective
from longshore.learner.objectives.tokens import TokenBatch
from longshore.learner.objectives.variance import ess_share, optimal_baseline, squared_gradients, step_scale
from longshore.learner.streams import TokenStreams
from longshore.learner.value_head import generalised_advantages


@dataclass(frozen=True)
class Scores:
    """What a forward pass says of the sampled tokens of a micro-batch; [N] each."""

    # With gradients, except in a preview.
    logp: Tensor
    entropy: Tensor
    # sum_v pi_v^2: the chance that two draws agree.
    collision: Tensor
    # The value head's answer to what stands before each token, where there is one.
    values: Tensor | None = None


@dataclass(frozen=True)
class Others:
    """Log-probs of the same tokens under other policies, without gradients; [N] each."""

    reference: Tensor | None = None
    anchor: Tensor | None = None


@dataclass
class LossSums:
    """Sums over the sampled tokens of one step, from which the means in `metrics` are made."""

    tokens: int = 0
    loss: float = 0.0
    policy: float = 0.0
    entropy: float = 0.0
    masked: float = 0.0
    kl: float = 0.0
    ratio: float = 0.0
    ratio_max: float = 0.0
    reference_kl: float = 0.0
    same_version_tokens: int = 0
    same_version_kl: float = 0.0
    # Tokens of the same version whose KV cache older weights had begun.
    carried_tokens: int = 0
    carried_kl: float = 0.0
    # Masked tokens that had become more probable.
    masked_high: float = 0.0
    # Of the value head: squared errors, returns, their squares, and errors.
    value_squares: float = 0.0
    value_errors: float = 0.0
    returns: float = 0.0
    return_squares: float = 0.0
    # log s of each sequence.
    log_ratios: list[Tensor] = field(default_factory=list)

    def add(self, other: LossSums) -> None:
        """Takes in the sums over other tokens of the step."""
        self.ratio_max = max(self.ratio_max, other.ratio_max)
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.log_ratios += other.log_ratios


_SUMMED = [item.name for item in fields(LossSums) if item.name not in ("ratio_max", "log_ratios")]


class BatchLoss:
    """The loss of one batch, pass by pass."""

    def __init__(
        self,
        spec: TrainSpec,
        objective: Objective,
        totals: Totals,
        again: Tensor,
        policy_version: int,
        reply_limit: int | None,
    ) -> None:
        """
        Args:
            spec: of the job.
            objective: the one that `spec` names.
            totals: of the whole batch.
            again: [sequences] bool, whether a sequence's rollout was trained on before.
            policy_version: version of the weights before this step.
            reply_limit: the most tokens that a rollout can have sampled, for normalisation by a constant.
        """
        self._spec, self._objective = spec, objective
        self._version, self._reply_limit = policy_version, reply_limit
        self._totals = totals
        # Of the passes in their order, once there was a preview.
        self._keep: list[Tensor] | None = None
        self._advantages: list[Tensor] | None = None
        self._returns: list[Tensor] | None = None
        # None: none was.
        self._again = again if bool(again.any()) else None
        self.sums = LossSums()
        self.health = TokenHealth()
        # Positions of the rollouts with a log-prob or a loss that is no number.
        self.not_finite: set[int] = set()

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch that carry loss."""
        return self._totals.tokens

    @property
    def wants_preview(self) -> bool:
        """Whether the log-probs of the whole batch must be known before its first gradient."""
        spec = self._spec
        return self._objective.keep is not None or spec.optimal_baseline is not None or isinstance(spec.credit, Gae)

    def preview(self, passes: Sequence[tuple[TokenStreams, Scores]]) -> None:
        """Works out what is of the batch as a whole, from every pass of it (without gradients)."""
        sizes = [streams.behaviour.numel() for streams, _ in passes]
        streams = TokenStreams.joined([streams for streams, _ in passes])
        logp = torch.cat([scores.logp.detach() for _, scores in passes])
        if self._objective.keep is not None:
            whole = self._tokens(streams, logp, streams.advantages, None, None)
            self._keep = list(self._objective.keep(whole).split(sizes))
        if self._spec.optimal_baseline is not None:
            collision = torch.cat([scores.collision for _, scores in passes])
            groups = streams.groups if self._spec.optimal_baseline == "group" else torch.zeros_like(streams.groups)
            shifted = optimal_baseline(
                streams.advantages,
                logp - streams.behaviour,
                squared_gradients(logp, collision),
                streams.sequences,
                groups,
            )
            self._advantages = list(shifted.split(sizes))
        if isinstance(self._spec.credit, Gae):
            values = torch.cat([scores.values for _, scores in passes if scores.values is not None])
            advantages, returns = generalised_advantages(streams, values, self._spec.credit)
            self._advantages, self._returns = list(advantages.split(sizes)), list(returns.split(sizes))

    def add(self, number: int, streams: TokenStreams, scores: Scores, others: Others) -> Tensor:
        """The share of pass `number` (from 0) in the batch's loss, a scalar with a gradient."""
        advantages = streams.advantages if self._advantages is None else self._advantages[number]
        keep = None if self._keep is None else self._keep[number]
        tokens = self._tokens(streams, scores.logp, advantages, keep, others.anchor)
        result = self._objective.loss(tokens)
        loss = result.loss
        if self._spec.kl is not None:
            assert others.reference is not None
            loss = loss + kl_term(tokens, others.reference, self._spec.kl)
        if self._returns is not None:
            loss = loss + self._value_loss(scores, self._returns[number])
        scale = scales(self._spec.objective.normalise, streams.rollouts, self._totals, self._reply_limit)
        total = (loss * streams.weights * scale).sum()
        with torch.no_grad():
            self._count(tokens, streams, scores, result.loss, result.masked, others)
            self._look(tokens, streams, loss, result.masked)
            self.sums.loss += float(total)
        return total

    def _value_loss(self, scores: Scores, returns: Tensor) -> Tensor:
        """[N] coefficient / 2 * (V_t - return_t)^2"""
        assert isinstance(self._spec.credit, Gae)
        assert scores.values is not None
        errors = scores.values - returns
        with torch.no_grad():
            self.sums.value_errors += float(errors.sum())
            self.sums.value_squares += float(errors.square().sum())
            self.sums.returns += float(returns.sum())
            self.sums.return_squares += float(returns.square().sum())
        return 0.5 * self._spec.credit.value_coefficient * errors.square()

    def numbers(self) -> Tensor:
        """[L] float64: what this process's passes have come to, for the processes that had the others."""
        sums, odd = self.sums, sorted(self.not_finite)
        scalars = [sums.ratio_max, *(float(getattr(sums, name)) for name in _SUMMED), float(len(odd)), *odd]
        return torch.cat(
            [
                torch.tensor(scalars, dtype=torch.float64),
                self.health.numbers(),
                *(one.double() for one in sums.log_ratios),
            ]
        )

    def take_in(self, parts: Sequence[Tensor]) -> None:
        """From here on the sums are those of all passes, given the `numbers` of every process, this one's too."""
        self.sums, self.health = LossSums(), TokenHealth()
        for part in parts:
            at = 1 + len(_SUMMED)
            scalars, odd = part[:at].tolist(), int(part[at])
            other = LossSums(ratio_max=scalars[0])
            for name, value in zip(_SUMMED, scalars[1:], strict=True):
                setattr(other, name, value)
            self.not_finite.update(int(position) for position in part[at + 1 : at + 1 + odd])
            rest = part[at + 1 + odd :]
            self.health.take_in(rest[: TokenHealth.NUMBERS])
            other.log_ratios = [rest[TokenHealth.NUMBERS :].float()] if rest.numel() > TokenHealth.NUMBERS else []
            self.sums.add(other)

    def step_scale(self) -> float:
        """What the learning rate of this step is multiplied by; known after the last pass."""
        if self._spec.ess_step is None or not self.sums.log_ratios:
            return 1.0
        return step_scale(torch.cat(self.sums.log_ratios), self._spec.ess_step)

    def _tokens(
        self, streams: TokenStreams, logp: Tensor, advantages: Tensor, keep: Tensor | None, anchor: Tensor | None
    ) -> TokenBatch:
        return TokenBatch(
            logp=logp,
            behaviour=streams.behaviour,
            advantages=advantages,
            sequences=streams.sequences,
            ages=(self._version - streams.versions).clamp(min=0),
            keep=torch.ones_like(streams.behaviour, dtype=torch.bool) if keep is None else keep,
            anchor=anchor,
        )

    def _count(
        self,
        tokens: TokenBatch,
        streams: TokenStreams,
        scores: Scores,
        policy_loss: Tensor,
        masked: Tensor,
        others: Others,
    ) -> None:
        sums, log_ratio = self.sums, tokens.log_ratio
        ratio = log_ratio.exp()
        kl = ratio - 1 - log_ratio
        same = (streams.versions == self._version) & ~streams.carried
        carried = (streams.versions == self._version) & streams.carried
        sums.tokens += log_ratio.numel()
        sums.policy += float(policy_loss.sum())
        sums.entropy += float(scores.entropy.sum())
        sums.masked += float(masked.sum())
        sums.kl += float(kl.sum())
        sums.ratio += float(ratio.sum())
        sums.ratio_max = max(sums.ratio_max, float(ratio.max()) if ratio.numel() else 0.0)
        sums.same_version_tokens += int(same.sum())
        sums.same_version_kl += float(kl[same].sum())
        sums.carried_tokens += int(carried.sum())
        sums.carried_kl += float(kl[carried].sum())
        sums.masked_high += float((masked & (log_ratio > 0)).sum())
        if others.reference is not None:
            log_q = others.reference - tokens.logp
            sums.reference_kl += float((log_q.exp() - 1 - log_q).sum())
        if log_ratio.numel():
            sums.log_ratios.append(tokens.sums(log_ratio)[_one_of_each(streams.sequences)].cpu())

    def _look(self, tokens: TokenBatch, streams: TokenStreams, loss: Tensor, masked: Tensor) -> None:
        if self._again is not None:
            self._again = self._again.to(streams.sequences.device)
        again = None if self._again is None else self._again[streams.sequences]
        self.health.add(tokens.log_ratio, tokens.ages, masked, again)
        odd = ~(torch.isfinite(tokens.logp) & torch.isfinite(loss))
        if bool(odd.any()):
            self.not_finite.update(streams.rollouts[odd].unique().tolist())

    def metrics(self) -> dict[str, float]:
        """The metrics of the batch, after its last pass; `loss/policy` is a mean over tokens, `loss/total` what was
        minimised."""
        sums = self.sums
        tokens = max(1, sums.tokens)
        metrics = {
            "loss/policy": sums.policy / tokens,
            "loss/total": sums.loss,
            "policy/entropy": sums.entropy / tokens,
            "policy/masked_frac": sums.masked / tokens,
            "policy/masked_high_frac": sums.masked_high / tokens,
            "mismatch_kl/mean": sums.kl / tokens,
            "is_ratio/mean": sums.ratio / tokens,
            "is_ratio/max": sums.ratio_max,
            "is_ratio/ess": ess_share(torch.cat(sums.log_ratios)) if sums.log_ratios else 1.0,
            "perf/trained_tokens": float(sums.tokens),
            **self.health.metrics(),
        }
        if sums.same_version_tokens:
            metrics["mismatch_kl/same_version"] = sums.same_version_kl / sums.same_version_tokens
        if sums.carried_tokens:
            metrics["mismatch_kl/same_version_carried"] = sums.carried_kl / sums.carried_tokens
        if self._spec.kl is not None:
            metrics["reference_kl/mean"] = sums.reference_kl / tokens
        if self._returns is not None:
            metrics["value/loss"] = sums.value_squares / tokens
            variance = sums.return_squares / tokens - (sums.returns / tokens) ** 2
            left = sums.value_squares / tokens - (sums.value_errors / tokens) ** 2
            metrics["value/explained_variance"] = 1.0 - left / variance if variance > 0 else 0.0
        return metrics


def _one_of_each(sequences: Tensor) -> Tensor:
    """The place of the first token of each sequence."""
    distinct, inverse = sequences.unique(return_inverse=True)
    places = torch.arange(sequences.numel(), device=sequences.device)
    return places.new_full((distinct.numel(),), sequences.numel()).scatter_reduce(0, inverse, places, "amin")
