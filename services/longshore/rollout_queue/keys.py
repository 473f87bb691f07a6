"""Names of a job's keys on the broker; nothing else spells them.

All keys of a job carry the hash tag `{project/job}`, so that a cluster keeps them in one slot and one function can
touch them all. Knows no commands.
"""

from __future__ import annotations

from dataclasses import dataclass

from longshore.types import JobRef

# Consumer groups: every actor of a site is a consumer of the first, the learner is the only one of the second.
ACTORS = "actors"
LEARNER = "learner"


def job_prefix(job: JobRef) -> str:
    """What every key of a job starts with. Example: "ls:{default/first-light-4f7c1a}:"

    Raises:
        ValueError: a brace in a name would end the hash tag early.
    """
    if set("{}") & set(str(job)):
        raise ValueError(f"a job's names must not hold braces: {job}")
    return f"ls:{{{job}}}:"


@dataclass(frozen=True)
class JobKeys:
    """The keys that one job uses at one site."""

    job: JobRef
    site: str = "home"

    @property
    def tickets(self) -> str:
        """Stream of tickets to work on."""
        return f"{job_prefix(self.job)}tickets:{self.site}"

    @property
    def rollouts(self) -> str:
        """Stream of rollouts and final notices for the learner."""
        return f"{job_prefix(self.job)}rollouts:{self.site}"

    @property
    def active(self) -> str:
        """Set of the ticket keys that are not final."""
        return f"{job_prefix(self.job)}active:{self.site}"

    @property
    def counts(self) -> str:
        """Hash of `issued` and `state:<name>`."""
        return f"{job_prefix(self.job)}counts"

    @property
    def epoch(self) -> str:
        return f"{job_prefix(self.job)}epoch"

    @property
    def dead(self) -> str:
        """Stream of dead letters, bounded."""
        return f"{job_prefix(self.job)}dead"

    @property
    def events(self) -> str:
        """Stream of the job's events, bounded."""
        return f"{job_prefix(self.job)}events"

    @property
    def command(self) -> str:
        return f"{job_prefix(self.job)}command"

    @property
    def ticket_prefix(self) -> str:
        """A ticket's hash is this and its key."""
        return f"{job_prefix(self.job)}t:"

    @property
    def for_functions(self) -> tuple[str, ...]:
        """KEYS of every function in functions.lua, in its order."""
        return (self.tickets, self.rollouts, self.active, self.counts, self.epoch, self.dead)
