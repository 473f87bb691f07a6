"""The part of a JobSpec that says how rollouts are used again: `train.replay`. What each choice does:
learner/replay/strategies.py and docs/replay.md."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longshore.config_base import Spec

Priority = Literal["uniform", "recency", "advantage", "difficulty"]
Admit = Literal["signal", "hard", "young"]
Evict = Literal["oldest", "most-used", "least-priority"]


class ReplaySpec(Spec):
    """Groups that were trained on are kept on disk, and some of them join later batches."""

    share: float = Field(
        0.25, gt=0, le=0.9, description="replayed groups in a batch; they come beside the `groups_per_step` fresh ones"
    )
    max_uses: int = Field(4, ge=2, le=1000, description="trainings on a rollout, its first among them")
    max_age: int = Field(64, ge=1, le=100_000, description="versions since its oldest token; an older one is let go")
    priority: Priority = Field("recency", description="which groups are drawn more often")
    half_life: float | None = Field(
        None, gt=0, le=1e6, description="versions in which a replayed token's weight halves; absent: it keeps it"
    )
    admit: Admit = Field("signal", description="which groups are kept at all")
    evict: Evict = Field("oldest", description="which groups go when there is no room")
    size_mb: int = Field(256, ge=1, le=2**24, description="most bytes of the kept groups on disk, in MiB")
    ess_floor: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="effective share of the replayed tokens below which less, and younger, is replayed; 0: never",
    )
