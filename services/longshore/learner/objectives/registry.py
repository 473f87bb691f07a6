"""From the objective that a JobSpec names to the function that is minimised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from longshore import config_objective as specs
from longshore.learner.objectives import regression, reinforce, surrogate
from longshore.learner.objectives.tokens import TokenBatch, TokenLoss


@dataclass(frozen=True)
class Objective:
    """One objective with its hyper-parameters bound."""

    loss: Callable[[TokenBatch], TokenLoss]
    # [N] bool of a whole batch, to be worked out before its first gradient; None: every token is kept.
    keep: Callable[[TokenBatch], Tensor] | None = None
    # Train steps between two anchor policies; None: it has none of its own.
    anchor_every: int | None = None


_LOSSES: dict[type[specs.ObjectiveSpec], Callable[[TokenBatch, Any], TokenLoss]] = {
    specs.DppoObjective: regression.dppo,
    specs.ReinforceObjective: reinforce.reinforce,
    specs.RlooObjective: reinforce.reinforce,
    specs.ClipObjective: surrogate.clip,
    specs.GrpoObjective: surrogate.clip,
    specs.DrGrpoObjective: surrogate.clip,
    specs.DapoObjective: surrogate.clip,
    specs.ReinforcePlusPlusObjective: surrogate.clip,
    specs.GspoObjective: surrogate.gspo,
    specs.CispoObjective: reinforce.cispo,
    specs.DecoupledPpoObjective: surrogate.decoupled_ppo,
    specs.A3poObjective: surrogate.a3po,
    specs.ToprObjective: reinforce.topr,
    specs.M2poObjective: surrogate.m2po,
    specs.IcepopObjective: reinforce.icepop,
    specs.SequenceMaskObjective: reinforce.sequence_mask,
    specs.SapoObjective: surrogate.sapo,
    specs.KimiObjective: regression.kimi,
    specs.OaplObjective: regression.oapl,
    specs.VespoObjective: reinforce.vespo,
}


def build_objective(spec: specs.AnyObjective) -> Objective:
    """The objective that a JobSpec names."""
    function = _LOSSES[type(spec)]
    keep: Callable[[TokenBatch], Tensor] | None = None
    if isinstance(spec, specs.M2poObjective):
        keep = partial(surrogate.second_moment_keep, spec=spec)
    anchor_every = spec.anchor_every if isinstance(spec, specs.DecoupledPpoObjective) else None
    return Objective(lambda tokens: function(tokens, spec), keep, anchor_every)
