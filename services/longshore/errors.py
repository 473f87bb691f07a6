"""Every error that Longshore raises on purpose.

    LongshoreError
    |-- InvalidJobSpec          faults of a JobSpec, each with its path (CLI: exit 2, REST: 422)
    |-- ConfigError             a process was started with settings that cannot work
    |-- Forbidden               whoever asks may not do this
    |-- NotFound                no such job, version, ticket
    |-- Conflict                the state does not allow what was asked
    |   `-- Fenced              an older learner epoch or lease attempt tried to write
    |-- Rejected                a rollout, verdict or payload failed validation; carries the reason
    |-- IntegrityError          a checksum or a signature does not match
    |-- Interrupted             a process was told to stop before its work was done
    |-- Unavailable             a peer cannot be reached or is not ready; worth a retry
    |   `-- Busy                there is no room now; there will be, so there is no deadline
    `-- PluginError             an entry point is unknown or failed to load

ValueError and assertions are for programming mistakes; these are for the world's.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

# A value may be of any size; all of it is never written out.
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


class LongshoreError(Exception):
    """Base of all errors raised on purpose; its text is fit for a person."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a JobSpec.

    Example: Fault("train.group_size", 1, "must be at least 2, so that a group has a baseline")
    """

    path: str
    value: object
    message: str

    def __str__(self) -> str:
        shown = _BRIEF.repr(self.value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return f"{self.path}: {self.message} (got {shown})"


class InvalidJobSpec(LongshoreError):
    """A JobSpec was refused. `faults` lists everything that is wrong, not only the first thing."""

    def __init__(self, faults: list[Fault]) -> None:
        assert faults
        self.faults = faults
        super().__init__("; ".join(str(fault) for fault in faults))


class ConfigError(LongshoreError):
    """A process cannot work with the settings that it was given."""


class Forbidden(LongshoreError):
    """Whoever asks may not do this; another key or role may."""


class NotFound(LongshoreError):
    """What was asked for does not exist."""


class Conflict(LongshoreError):
    """The present state does not allow what was asked."""


class Fenced(Conflict):
    """The writer has been superseded (law 4) and must stop, not retry."""


class Rejected(LongshoreError):
    """Something received failed validation. `reason` is a short stable word for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class IntegrityError(LongshoreError):
    """Bytes do not match their checksum or signature."""


class Unavailable(LongshoreError):
    """A peer cannot be reached or is not ready; the caller may retry within its deadline."""


class Busy(Unavailable):
    """Everything that could do it is at work on something else; whoever waits has not failed."""


class Interrupted(LongshoreError):
    """The process was told to stop before its work was done; a later one goes on from what is durable."""


class PluginError(LongshoreError):
    """An entry point is unknown or failed to load."""
