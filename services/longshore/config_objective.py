"""The part of a JobSpec that says what is minimised: `train.objective` and what goes beside it. Formulas, papers and
when to use which: docs/objectives.md and the functions in learner/objectives/."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from longshore.config_base import Spec
from longshore.config_credit import AnyCredit, BatchWhitened, GroupMean, GroupMeanStd, LeaveOneOut, SoftValue, named
from longshore.job_faults import Misfit, refuse

# How the losses of single tokens add up to the loss of a batch; learner/objectives/normalise.py.
Normalise = Literal["tokens", "rollouts", "rollout-sums", "constant"]
Level = Literal["token", "sequence"]
# Target staleness from which on another objective is the default; chosen by measurement, docs/staleness.md.
MUCH_STALENESS = 16


class ObjectiveSpec(Spec):
    """What every objective has."""

    # The advantage that goes with it unless the job says otherwise.
    credit: ClassVar[AnyCredit] = GroupMean()

    normalise: Normalise = "tokens"


class DppoObjective(ObjectiveSpec):
    """Divergence-masked policy gradient with a quadratic log-ratio term."""

    name: Literal["dppo"] = "dppo"
    max_probability_gap: float = Field(0.2, gt=0, le=1)
    ratio_cap: float = Field(20.0, gt=1, le=1e6)
    quadratic: float = Field(1e-3, ge=0, le=1e6)


class ReinforceSpec(ObjectiveSpec):
    """What the variants of REINFORCE have."""

    level: Level = "token"
    ratio_cap: float = Field(2.0, ge=1, le=1e6)


class ReinforceObjective(ReinforceSpec):
    """REINFORCE with truncated importance sampling (TIS)."""

    name: Literal["reinforce"] = "reinforce"


class RlooObjective(ReinforceSpec):
    """REINFORCE on whole replies against the mean of the other attempts."""

    credit = LeaveOneOut()

    name: Literal["rloo"] = "rloo"
    level: Level = "sequence"
    normalise: Normalise = "rollout-sums"


class ClippedSpec(ObjectiveSpec):
    """A band of ratios: from 1 - clip_low to 1 + clip_high."""

    clip_low: float = Field(0.2, gt=0, le=1)
    clip_high: float = Field(0.2, gt=0, le=1e6)


class SurrogateSpec(ClippedSpec):
    """PPO's clipped surrogate, with the further bounds that others have put on it."""

    dual_clip: float | None = Field(None, gt=1, le=1e6, description="bound of the loss where the advantage is negative")
    two_sided: float | None = Field(None, gt=1, le=1e6, description="bound of the ratio itself")

    @model_validator(mode="after")
    def _bounds_fit(self) -> SurrogateSpec:
        if self.two_sided is not None and self.two_sided <= 1 + self.clip_high:
            message = f"must exceed 1 + clip_high ({1 + self.clip_high:g})"
            refuse([Misfit("two_sided", self.two_sided, message, ("clip_high",))])
        return self


class ClipObjective(SurrogateSpec):
    """The clipped surrogate, every token alike."""

    name: Literal["clip"] = "clip"


class GrpoObjective(SurrogateSpec):
    """GRPO: the mean of each rollout's own mean."""

    credit = GroupMeanStd()

    name: Literal["grpo"] = "grpo"
    normalise: Normalise = "rollouts"


class DrGrpoObjective(SurrogateSpec):
    """Dr. GRPO: GRPO without its biases of length and of difficulty."""

    name: Literal["dr-grpo"] = "dr-grpo"
    normalise: Normalise = "constant"


class DapoObjective(SurrogateSpec):
    """DAPO: more room upward, every token alike."""

    credit = GroupMeanStd()

    name: Literal["dapo"] = "dapo"
    clip_high: float = Field(0.28, gt=0, le=1e6)


class ReinforcePlusPlusObjective(SurrogateSpec):
    """REINFORCE++: no group baseline, advantages whitened over the batch."""

    credit = BatchWhitened()

    name: Literal["reinforce++"] = "reinforce++"


class GspoObjective(ClippedSpec):
    """GSPO: one length-normalised ratio a sequence."""

    credit = GroupMeanStd()

    name: Literal["gspo"] = "gspo"
    clip_low: float = Field(3e-4, gt=0, le=1)
    clip_high: float = Field(4e-4, gt=0, le=1e6)
    normalise: Normalise = "rollouts"


class CispoObjective(ClippedSpec):
    """CISPO: the weight is clipped, never the token."""

    credit = GroupMeanStd()

    name: Literal["cispo"] = "cispo"
    clip_low: float = Field(1.0, gt=0, le=1, description="1: no lower bound")
    clip_high: float = Field(4.0, gt=0, le=1e6)


class DecoupledPpoObjective(ClippedSpec):
    """Decoupled PPO: clipped against an anchor policy, weighted from the behaviour policy to the anchor."""

    credit = GroupMeanStd()

    name: Literal["decoupled-ppo"] = "decoupled-ppo"
    weight_cap: float = Field(5.0, gt=1, le=1e6, description="tokens with more weight are masked")
    anchor_every: int = Field(4, ge=1, le=1_000_000, description="train steps between two anchors")


class A3poObjective(ClippedSpec):
    """A-3PO: decoupled PPO with an anchor interpolated from the token's age, for no forward pass."""

    credit = GroupMeanStd()

    name: Literal["a-3po"] = "a-3po"
    weight_cap: float = Field(5.0, gt=1, le=1e6, description="tokens with more weight are masked")


class ToprObjective(ObjectiveSpec):
    """TOPR: good rollouts as they are, bad ones tapered off."""

    name: Literal["topr"] = "topr"
    negative_cap: float = Field(1.0, gt=0, le=1e6)


class M2poObjective(ObjectiveSpec):
    """M2PO: the batch's second moment of log-ratios is bounded by masking the fewest tokens."""

    credit = GroupMeanStd()

    name: Literal["m2po"] = "m2po"
    threshold: float = Field(0.04, gt=0, le=1e6)


class IcepopObjective(ObjectiveSpec):
    """IcePop: tokens outside a band of ratios are left out."""

    credit = GroupMeanStd()

    name: Literal["icepop"] = "icepop"
    low: float = Field(0.5, ge=0, lt=1)
    high: float = Field(5.0, gt=1, le=1e6)


class SequenceMaskObjective(ObjectiveSpec):
    """Truncated importance sampling on the sequences that pass a test of their ratios (MIS, Geo-RS, K3-RS)."""

    name: Literal["sequence-mask"] = "sequence-mask"
    statistic: Literal["product", "geometric", "k3"] = "geometric"
    low: float | None = Field(None, ge=0, lt=1, description="absent: 0.5 (product), 0.99 (geometric)")
    high: float | None = Field(None, gt=0, le=1e6, description="absent: 2 (product), 1.01 (geometric), 0.01 (k3)")
    veto: float = Field(1e-4, ge=0, lt=1, description="a sequence with a token of a lower ratio is left out")
    ratio_cap: float = Field(2.0, ge=1, le=1e6)

    @property
    def bounds(self) -> tuple[float, float]:
        """The band that a sequence's statistic must lie in."""
        low, high = {"product": (0.5, 2.0), "geometric": (0.99, 1.01), "k3": (0.0, 0.01)}[self.statistic]
        return (low if self.low is None else self.low, high if self.high is None else self.high)

    @model_validator(mode="after")
    def _band_fits(self) -> SequenceMaskObjective:
        if self.statistic == "k3" and self.low is not None:
            message = "has no meaning with statistic k3, which is never negative: leave it out"
            refuse([Misfit("low", self.low, message, ("statistic",))])
        if self.statistic != "k3" and self.high is not None and self.high <= 1:
            refuse([Misfit("high", self.high, f"must exceed 1 with statistic {self.statistic}", ("statistic",))])
        return self


class SapoObjective(ObjectiveSpec):
    """SAPO: a soft gate in place of the clip."""

    credit = GroupMeanStd()

    name: Literal["sapo"] = "sapo"
    tau_positive: float = Field(1.0, gt=0, le=1e3)
    tau_negative: float = Field(1.05, gt=0, le=1e3)
    normalise: Normalise = "rollouts"


class KimiObjective(ObjectiveSpec):
    """Kimi k1.5: policy gradient with a quadratic pull to the behaviour policy; the gradient of DRO."""

    name: Literal["kimi"] = "kimi"
    tau: float = Field(0.1, gt=0, le=1e6)
    level: Level = "token"


class OaplObjective(ObjectiveSpec):
    """OAPL: the log-ratio of a sequence is regressed on its advantage; no importance weight at all."""

    credit = SoftValue()

    name: Literal["oapl"] = "oapl"
    beta: float = Field(0.1, gt=0, le=1e6)
    normalise: Normalise = "rollout-sums"


class VespoObjective(ObjectiveSpec):
    """VESPO: a smooth kernel of the sequence's ratio, one for each sign of the advantage."""

    name: Literal["vespo"] = "vespo"
    k_positive: float = Field(2.0, gt=0, le=1e3)
    lambda_positive: float = Field(3.0, gt=0, le=1e3)
    k_negative: float = Field(3.0, gt=0, le=1e3)
    lambda_negative: float = Field(2.0, gt=0, le=1e3)


AnyObjective = (
    DppoObjective
    | ReinforceObjective
    | RlooObjective
    | ClipObjective
    | GrpoObjective
    | DrGrpoObjective
    | DapoObjective
    | ReinforcePlusPlusObjective
    | GspoObjective
    | CispoObjective
    | DecoupledPpoObjective
    | A3poObjective
    | ToprObjective
    | M2poObjective
    | IcepopObjective
    | SequenceMaskObjective
    | SapoObjective
    | KimiObjective
    | OaplObjective
    | VespoObjective
)
Objective = Annotated[AnyObjective, Field(discriminator="name"), BeforeValidator(named)]


def with_default_objective(train: object) -> object:
    """A `train` whose tokens may be 16 versions old or older, and that does not say what it minimises, takes TOPR.

    Example: with_default_objective({"steps": 9, "target_staleness": 64})["objective"] == "topr"
    """
    if isinstance(train, dict) and "objective" not in train:
        staleness = train.get("target_staleness")
        if isinstance(staleness, int) and staleness >= MUCH_STALENESS:
            return {**train, "objective": "topr"}
    return train


class KlSpec(Spec):
    """A pull towards the policy that reinforcement began with."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    coefficient: float = Field(gt=0, le=1e6)
    unbiased: bool = Field(False, description="weigh by the importance ratio, gradient included")

    @model_validator(mode="after")
    def _has_a_gradient(self) -> KlSpec:
        if self.estimator == "k1" and not self.unbiased:
            message = "k1 pulls nowhere in expectation without unbiased: true; set that, or take k2"
            refuse([Misfit("estimator", self.estimator, message, ("unbiased",))])
        return self


class EssStepSpec(Spec):
    """A smaller step where few of the batch's sequences carry its weight (VCPO)."""

    base: float = Field(1.0, gt=0, le=1, description="share of effective sequences that keeps the whole step")
    ratio_cap: float = Field(2.0, ge=1, le=1e6, description="truncates the sequences' ratios")
