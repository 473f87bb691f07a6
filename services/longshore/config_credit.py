"""The part of a JobSpec that says how rewards become advantages: `train.advantage`. Formulas: docs/objectives.md."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from longshore.config_base import Spec


class GroupMean(Spec):
    """A rollout against the mean of its group (Dr. GRPO)."""

    name: Literal["group-mean"] = "group-mean"


class GroupMeanStd(Spec):
    """The same, divided by the group's standard deviation (GRPO)."""

    name: Literal["group-mean-std"] = "group-mean-std"


class LeaveOneOut(Spec):
    """A rollout against the mean of the others of its group (RLOO)."""

    name: Literal["leave-one-out"] = "leave-one-out"


class BatchWhitened(Spec):
    """Rewards against the mean of all tokens of the batch, in their standard deviations (REINFORCE++)."""

    name: Literal["batch-whitened"] = "batch-whitened"
    group_baseline: bool = Field(False, description="subtract the group's mean first")


class SoftValue(Spec):
    """A rollout against the soft value of its group: what a policy tilted by the reward would earn (OAPL)."""

    name: Literal["soft-value"] = "soft-value"
    temperature: float = Field(0.05, gt=0, le=1e6, description="small: near the group's best; large: its mean")


class TurnRewards(Spec):
    """Outcome of the rollout, and of each turn but the last its own reward (MT-GRPO)."""

    name: Literal["turns"] = "turns"
    weight: float = Field(1.0, ge=0, le=1e6, description="of a turn's reward beside the outcome")
    std: bool = Field(True, description="divide by standard deviations")


class Gigpo(Spec):
    """Outcome of the rollout, and of each turn what came of the same state in the group's other rollouts (GiGPO)."""

    name: Literal["gigpo"] = "gigpo"
    weight: float = Field(1.0, ge=0, le=1e6, description="of the comparison within a state beside the outcome")
    gamma: float = Field(0.95, ge=0, le=1, description="discount a turn")
    std: bool = Field(True, description="divide by standard deviations")


class ProcessRewards(Spec):
    """Rewards of single tokens (or turns) that the verifier gave: each token gets what comes after it."""

    name: Literal["process"] = "process"
    gamma: float = Field(1.0, ge=0, le=1, description="discount a rewarded token")
    outcome: float = Field(1.0, ge=0, le=1e6, description="weight of the rollout's outcome beside them")
    std: bool = Field(True, description="divide by standard deviations")


class Gae(Spec):
    """Generalised advantage estimation with a value head on the policy's trunk."""

    name: Literal["gae"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1, description="discount a token")
    lam: float = Field(0.95, ge=0, le=1, description="0: one token's look ahead; 1: the whole return")
    value_coefficient: float = Field(0.5, gt=0, le=1e6, description="weight of the value head's squared error")
    whiten: bool = Field(True, description="advantages in standard deviations of the batch")


AnyCredit = (
    GroupMean | GroupMeanStd | LeaveOneOut | BatchWhitened | SoftValue | TurnRewards | Gigpo | ProcessRewards | Gae
)


def named(value: object) -> object:
    """A bare name stands for the choice with its defaults: `advantage: leave-one-out`."""
    return {"name": value} if isinstance(value, str) else value


Credit = Annotated[AnyCredit, Field(discriminator="name"), BeforeValidator(named)]


class OverlongSpec(Spec):
    """Soft punishment of long rollouts (DAPO): nothing up to `limit - buffer` sampled tokens, `penalty` at `limit`."""

    limit: int = Field(ge=1, le=100_000_000, description="sampled tokens of a rollout")
    buffer: int = Field(ge=1, le=100_000_000, description="tokens over which the punishment grows")
    penalty: float = Field(1.0, gt=0, le=1e6, description="what is taken from the reward at the limit")
