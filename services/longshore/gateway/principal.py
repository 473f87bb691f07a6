"""Who calls, and what they may do. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.IntEnum):
    """Each may do what those before it may."""

    # Of a rollout site's own key: renews that site's credential, and nothing else.
    SITE = 0
    # Reads everything of its project.
    VIEWER = 1
    # Submits and steers jobs.
    SUBMITTER = 2
    # Makes API keys and reads the audit log; of every project: also sets quotas.
    ADMIN = 3

    @property
    def word(self) -> str:
        return self.name.lower()


ROLES = {role.word: role for role in Role}


@dataclass(frozen=True)
class Principal:
    """Example: Principal("key:4f7c1a09b2d3", "vision", Role.SUBMITTER)"""

    id: str
    # None: every project.
    project: str | None
    role: Role

    def may(self, role: Role) -> bool:
        return self.role >= role

    def sees(self, project: str | None) -> bool:
        """Whether what belongs to a project (None: to all of them) is this caller's to know of."""
        return self.project is None or self.project == project
