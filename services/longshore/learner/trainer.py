"""One optimizer step on one batch: tensors in, new weights and numbers out. Knows no broker and no versions' names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from longshore.config import TrainSpec
from longshore.config_credit import Gae
from longshore.learner.batch import MicroBatch
from longshore.learner.batch_loss import BatchLoss, Others, Scores
from longshore.learner.frozen import FrozenPolicies
from longshore.learner.lora import Adapters, trained_parameters
from longshore.learner.objectives.registry import build_objective
from longshore.learner.policy_compute import PolicyCompute
from longshore.learner.ranks.messages import Message
from longshore.learner.ranks.ranks import ALONE, Ranks
from longshore.learner.ranks.sharding import shard, whole
from longshore.learner.ranks.work import NOTHING, STEP, Work, share_out, to_message
from longshore.learner.sequences import TrainSequence
from longshore.learner.streams import TokenStreams
from longshore.learner.value_head import new_value_head, values_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Trainer:
    """Policy, optimizer and schedule. `step` is deterministic: same state, batch and ranks, same bits (on CPU).

    Where ranks share the policy out, each has a trainer: the leader's is told to `step`, the others' `take_part`.
    """

    def __init__(
        self,
        policy: torch.nn.Module,
        spec: TrainSpec,
        reply_limit: int | None = None,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            policy: in float32.
            spec: of the job.
            reply_limit: the most tokens that a rollout can have sampled; only for normalisation by a constant.
            seed: of the adapters' first weights, where the job trains those.
            ranks: those that share the policy out; the others' policies have the leader's shape, and get its weights.

        Raises:
            ConfigError: this policy cannot be trained so, or not on this machine.
        """
        if reply_limit is None and spec.objective.normalise == "constant":
            raise ValueError("normalisation by a constant needs reply_limit")
        self.policy = policy
        self.spec = spec
        self.ranks = ranks
        self._reply_limit = reply_limit
        self.objective = build_objective(spec.objective)
        self.adapters = None if spec.lora is None else Adapters(policy, spec.lora, seed, ranks)
        self.compute = PolicyCompute(
            policy,
            device=spec.compute.device,
            dtype=_DTYPES[spec.compute.dtype],
            pack_tokens=spec.compute.pack_tokens,
            compiled=spec.compute.device == "cuda",
            ranks=ranks,
        )
        self.frozen = FrozenPolicies(has_reference=spec.kl is not None, anchor_every=self.objective.anchor_every)
        self.value_head = None
        if isinstance(spec.credit, Gae):
            self.value_head = new_value_head(policy.config.hidden_size).to(self.compute.device)
            if ranks.size > 1:
                shard(self.value_head, (), ranks, spec.compute.device)
        # Of the last step: positions of rollouts with a log-prob or a loss that is no number.
        self.not_finite: list[int] = []
        self._parameters = [parameter for _, parameter in self.named_parameters()]
        self.optimizer = torch.optim.AdamW(
            self._parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay, betas=(0.9, 0.95), fused=True
        )

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Everything that is trained: the policy or its adapters, and a value head where there is one."""
        head = [] if self.value_head is None else self.value_head.named_parameters(prefix="value_head")
        return [*trained_parameters(self.policy), *head]

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
            sequences: what to train on.
            policy_version: version of the weights before this step, to tell how old tokens are.
        """
        work = share_out(number, sequences, policy_version, self.compute.pack_tokens, self.ranks.size)
        if work.totals.tokens == 0:
            self.not_finite = []
            return self._metrics(self._loss(work), 0.0, self.learning_rate(number))
        message = to_message(work) if self.ranks.size > 1 else Message(STEP)
        with self.ranks.command(STEP, message.told, message.tensors):
            return self.take_part(work)

    def take_part(self, work: Work) -> dict[str, float]:
        """This rank's part of a train step; on every rank at the same time."""
        loss, rate = self._loss(work), self.learning_rate(work.number)
        self.not_finite = []
        self.optimizer.zero_grad(set_to_none=True)
        micros = [micro.to(self.compute.device) for micro in work.micros]
        own = work.of(self.ranks.rank)
        others = self._others(work.number, micros, own)
        self.compute.refresh()
        if loss.wants_preview and (len(micros) > 1 or self.ranks.size > 1):
            with torch.no_grad():
                scored = [(place, self._scores(micro)) for place, micro in self._passes(micros, own)]
            streams = [micro.streams for micro in micros]
            loss.preview(list(zip(streams, _of_all(self.ranks, streams, scored), strict=True)))
        for place, micro in self._passes(micros, own):
            scores = self._scores(micro)
            if place == NOTHING:
                _no_loss(scores).backward()
                continue
            if loss.wants_preview and len(micros) == 1 and self.ranks.size == 1:
                loss.preview([(micro.streams, scores)])
            loss.add(place, micro.streams, scores, others[place]).backward()
        if self.ranks.size > 1:
            loss.take_in(self.ranks.gathered(loss.numbers()))
        self.not_finite = sorted(loss.not_finite)
        norm = whole(torch.nn.utils.clip_grad_norm_(self._parameters, self.spec.max_grad_norm))
        rate *= loss.step_scale()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if torch.isfinite(norm):
            # A step whose gradient is not a number would end the run; it is skipped, and optim/skipped says so.
            self.optimizer.step()
        return self._metrics(loss, float(norm), rate)

    def _loss(self, work: Work) -> BatchLoss:
        return BatchLoss(self.spec, self.objective, work.totals, work.again, work.policy_version, self._reply_limit)

    def _passes(self, micros: Sequence[MicroBatch], own: Sequence[int]) -> Iterator[tuple[int, MicroBatch]]:
        """This rank's passes in their order: a pack's number, or NOTHING, and the pack."""
        for place in own:
            yield place, self.compute.nothing() if place == NOTHING else micros[place]

    def _scores(self, micro: MicroBatch) -> Scores:
        told = self.compute.scores(micro)
        scores = Scores(told.logp, told.entropy, told.collision)
        return scores if self.value_head is None else replace(scores, values=values_of(self.value_head, told.hidden))

    def _others(self, number: int, micros: Sequence[MicroBatch], own: Sequence[int]) -> dict[int, Others]:
        """Log-probs of this rank's packs under the reference and under the anchor, where the job has them."""
        self.frozen.renew(number, self.policy)
        found: dict[int, dict[str, Tensor]] = {place: {} for place in own}
        for name in self.frozen.names:
            with self.frozen.lent_to(self.policy, name), torch.no_grad():
                self.compute.refresh()
                for place, micro in self._passes(micros, own):
                    found[place][name] = self.compute.scores(micro).logp
        return {place: Others(**values) for place, values in found.items()}

    def _metrics(self, loss: BatchLoss, norm: float, rate: float) -> dict[str, float]:
        metrics = {**loss.metrics(), "optim/lr": rate, "optim/grad_norm": norm}
        # JSON has no word for what is not finite.
        told = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return {**told, "optim/skipped": float(not math.isfinite(norm))}


def _of_all(ranks: Ranks, streams: Sequence[TokenStreams], scored: Sequence[tuple[int, Scores]]) -> list[Scores]:
    """The scores of every pack of a batch, given those that this rank has computed."""
    own = {place: scores for place, scores in scored if place != NOTHING}
    if ranks.size == 1:
        return [own[place] for place in range(len(streams))]
    made: dict[str, list[Tensor]] = {}
    for name in [name for name, value in vars(scored[0][1]).items() if value is not None]:
        # Each place is filled in by one rank, so the sum is that rank's number.
        parts = [torch.zeros_like(stream.behaviour) for stream in streams]
        for place, scores in own.items():
            parts[place] = getattr(scores, name)
        total = ranks.summed(torch.cat(parts)).to(streams[0].behaviour.device)
        made[name] = list(total.split([part.numel() for part in parts]))
    return [Scores(**{name: values[place] for name, values in made.items()}) for place in range(len(streams))]


def _no_loss(scores: Scores) -> Tensor:
    """0, with the gradients of a pass."""
    total = scores.logp.sum()
    return 0.0 * (total if scores.values is None else total + scores.values.sum())


def canary_logprobs(policy: torch.nn.Module, token_ids: Sequence[int]) -> list[float]:
    """[len - 1] log-probs of each token after the first, given those before it, at temperature 1."""
    policy.eval()
    ids = torch.tensor([list(token_ids)], device=next(policy.parameters()).device)
    with torch.no_grad():
        log_probs = functional.log_softmax(policy(input_ids=ids).logits[0, :-1].float(), dim=-1)
        return [float(value) for value in log_probs.gather(1, ids[0, 1:, None]).squeeze(1)]
