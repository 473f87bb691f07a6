"""Where text goes: a terminal with a moving line, or plain lines for files, pipes and CI."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TextIO

from longshore.console.progress import Status
from longshore.console.summary import Rows

# Plain output repeats the moving line this often, in seconds.
PLAIN_EVERY_S = 5.0


class Screen(Protocol):
    """What a command writes to."""

    def line(self, text: str, style: str = "") -> None:
        """A line that stays."""

    def status(self, status: Status) -> None:
        """What is going on now; replaces the last one."""

    def table(self, title: str, rows: Rows) -> None:
        """(label, text) rows that stay."""

    def close(self) -> None:
        """Takes the moving line away."""


def make_screen(out: TextIO) -> Screen:
    """A terminal's screen where `out` is one, else plain lines."""
    if out.isatty():
        from longshore.console.terminal import TerminalScreen

        return TerminalScreen()
    return PlainScreen(out)


class PlainScreen:
    """Lines without escape codes; the moving line every few seconds."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        # What was told last, and when.
        self._told_at = float("-inf")
        self._title = self._text = ""

    def line(self, text: str, style: str = "") -> None:
        self._out.write(f"{text}\n")
        self._out.flush()

    def status(self, status: Status) -> None:
        now, text = self._clock(), "  ".join([counted(status), *status.facts])
        # The end of a count is always told, its middle now and then.
        finished = 0 < status.total <= status.done
        recent = status.title == self._title and now - self._told_at < PLAIN_EVERY_S
        if text == self._text or (recent and not finished):
            return
        self._told_at, self._title, self._text = now, status.title, text
        self.line(text)

    def table(self, title: str, rows: Rows) -> None:
        self.line(title)
        for label, text in rows:
            self.line(f"  {label:<10} {text}".rstrip())

    def close(self) -> None:
        self._out.flush()


def counted(status: Status) -> str:
    """Example: "train step 12/400" """
    return f"{status.title} {status.done:,}/{status.total:,}" if status.total else status.title
