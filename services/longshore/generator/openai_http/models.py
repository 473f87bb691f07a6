"""Names of models: the job's, alone or with a policy version behind an @."""

from __future__ import annotations

import re
import time
from typing import Any

from longshore.generator.engine import Engine
from longshore.generator.openai_http.answers import model
from longshore.generator.openai_http.faults import unknown_model
from longshore.types import JobRef

_VERSION = re.compile(r"0|[1-9]\d{0,17}", re.ASCII)


class Models:
    """What one generator serves: its job's policy, under the job's id and under the name in its spec."""

    def __init__(self, job: JobRef, spec_name: str) -> None:
        self.job = job
        self._names = tuple(dict.fromkeys((job.job, spec_name)))
        self._created = int(time.time())

    def version_of(self, name: str) -> int | None:
        """The policy version that a name pins; None: whichever is served. Raises ApiError 404."""
        base, at, version = name.partition("@")
        if base not in self._names or (at and not _VERSION.fullmatch(version)):
            raise unknown_model(name[:200], self.job.job)
        return int(version) if at else None

    def all(self, engine: Engine | None) -> list[dict[str, Any]]:
        """The job under its names, and its versions that are in memory."""
        status = engine.status() if engine is not None else None
        versions = [] if status is None else [status.version, *status.beside]
        pinned = [f"{self.job.job}@{version}" for version in versions if version is not None]
        return [self._entry(name, engine) for name in (*self._names, *pinned)]

    def one(self, name: str, engine: Engine | None) -> dict[str, Any]:
        """One entry. Raises ApiError 404."""
        self.version_of(name)
        return self._entry(name, engine)

    def _entry(self, name: str, engine: Engine | None) -> dict[str, Any]:
        pinned = self.version_of(name)
        version = engine.status().version if pinned is None and engine is not None else pinned
        context = None if engine is None else engine.limits.context
        return model(name, self.job.project, self._created, policy_version=version, max_model_len=context)
