"""Names of a job's keys on the broker; nothing else spells them but functions.lua, which gets one of them each call.

All keys of a job carry the hash tag `{project/job}`, so that a cluster keeps them in one slot and one function can
touch them all. Knows no commands.
"""

from __future__ import annotations

from dataclasses import dataclass

from longshore.types import JobRef

# Consumer groups: every actor of a site is a consumer of the first, every site that leases tickets one of the second;
# the learner is the only one of the third (at a rollout site: the relay).
ACTORS = "actors"
SITES = "sites"
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
    """The keys that one job uses for the queue of one site: two sites may share a broker."""

    job: JobRef
    site: str = "home"

    @property
    def tickets(self) -> str:
        """Stream of tickets to work on."""
        return self._own("tickets")

    @property
    def leased(self) -> str:
        """Stream of tickets that other sites have under their leases."""
        return self._own("leased")

    @property
    def rollouts(self) -> str:
        """Stream of rollouts and final notices for the learner."""
        return self._own("rollouts")

    @property
    def live(self) -> str:
        """Hash of the tickets that are not final: by ticket key a line, whose words functions.lua tells."""
        return self._own("live")

    @property
    def counts(self) -> str:
        """Hash of `issued`, `bytes` (of rollouts in the stream) and `state:<name>@<site>`."""
        return self._own("counts")

    @property
    def epoch(self) -> str:
        return self._own("epoch")

    @property
    def dead(self) -> str:
        """Stream of dead letters, bounded."""
        return self._own("dead")

    @property
    def reconciled(self) -> str:
        """The incarnation of the broker with which the learner has reconciled."""
        return self._own("reconciled")

    @property
    def requeues(self) -> str:
        """Stream of tasks that people want attempted again, bounded."""
        return self._own("requeues")

    @property
    def events(self) -> str:
        """Stream of the job's events, bounded."""
        return f"{job_prefix(self.job)}events"

    @property
    def command(self) -> str:
        return f"{job_prefix(self.job)}command"

    @property
    def ticket_prefix(self) -> str:
        """A ticket's journal is this, its key and `:journal`."""
        return self._own("t:")

    def _own(self, name: str) -> str:
        return f"{job_prefix(self.job)}{self.site}:{name}"
