"""The part of a JobSpec that says which tasks are attempted more often: `tasks.curriculum`. See docs/replay.md."""

from __future__ import annotations

from pydantic import Field

from longshore.config_base import Spec


class CurriculumSpec(Spec):
    """A task whose turn comes is taken or passed over by chance, as its rate of success is near the target or far."""

    target: float = Field(0.5, ge=0, le=1, description="rate of success at which a task is always taken")
    least: float = Field(0.1, gt=0, le=1, description="chance of a task as far from the target as can be")
    pool: int | None = Field(
        None,
        ge=1,
        le=16_384,
        description="only the first so many tasks of the source, round and round; an endless source needs it",
    )
