"""When a process has died too often to be started again: the same rules for subprocesses and for pods. Pure."""

from __future__ import annotations

from dataclasses import dataclass

# Exit code of a process that cannot work with the settings that it was given (rpc/process.py).
WRONG_SETTINGS = 2


@dataclass(frozen=True)
class Rules:
    """How patient the supervisor is. All times in seconds."""

    first_backoff: float = 0.5
    max_backoff: float = 10.0
    # Deaths in a row without becoming ready, or with the exit code that says "wrong settings".
    max_failed_starts: int = 3
    # Deaths in a row by its own exit, each before it had worked for long: the same error again and again.
    max_short_failures: int = 5
    short_failure: float = 600.0
    # Deaths in a row by any cause, each soon after its start: somebody kills it, perhaps for its memory.
    max_short_lives: int = 20
    short_life: float = 60.0
    # To become ready.
    start_timeout: float = 180.0
    # Between SIGTERM and SIGKILL.
    grace: float = 8.0
    probe_every: float = 0.1
    # Once it is ready it is looked at this often, and so many looks in a row without an answer mean that it is stopped
    # or stuck: within the 15 s of an actor's default lease. Looks are counted, not time: a machine that slept has none.
    look_every: float = 2.0
    max_silent_looks: int = 4
    # One that does not answer and yet works (it imports, or loads a model, where others want the processor too) gets
    # this many looks.
    max_busy_looks: int = 20


@dataclass
class Deaths:
    """Deaths in a row of one process, of each kind that can be too many."""

    failed_starts: int = 0
    short_failures: int = 0
    short_lives: int = 0

    def count(self, became_ready: bool, exit_code: int, lived: float, rules: Rules) -> None:
        hopeful = became_ready and exit_code != WRONG_SETTINGS
        self.failed_starts = 0 if hopeful else self.failed_starts + 1
        failed = exit_code >= 0
        self.short_failures = self.short_failures + 1 if failed and lived < rules.short_failure else int(failed)
        self.short_lives = self.short_lives + 1 if lived < rules.short_life else 1

    def hopeless(self, rules: Rules) -> str:
        """How it died too often; "" while it may be tried again."""
        if self.failed_starts >= rules.max_failed_starts:
            return f"{self.failed_starts} times in a row without becoming ready"
        for count, most, within in (
            (self.short_failures, rules.max_short_failures, rules.short_failure),
            (self.short_lives, rules.max_short_lives, rules.short_life),
        ):
            if count >= most:
                return f"{count} times in a row, each time within {within:.0f} s of its start"
        return ""
