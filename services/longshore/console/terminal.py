"""The screen of a real terminal: lines scroll, and what is going on now stays below them."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from longshore.console.progress import Status
from longshore.console.screen import counted
from longshore.console.summary import Rows

_BAR = 16
_GAP = "  "
_MAX_LINES = 2
_UNDER_SPINNER = "\n  "
# The spinner and its margin.
_MARGIN = 4


class TerminalScreen:
    """See screen.Screen."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None

    def line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style))

    def status(self, status: Status) -> None:
        self._spinner.update(text=fitted(status, self._console.width - _MARGIN))
        if self._live is None:
            self._live = Live(self._spinner, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()

    def table(self, title: str, rows: Rows) -> None:
        self.close()
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in rows:
            table.add_row(Text(f"  {label}"), Text(text))
        self._console.print(Text(title, style="bold"))
        self._console.print(table)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def fitted(status: Status, width: int) -> Text:
    """Count, bar and facts on one line of at most `width` columns, or on two; what has no room is left out."""
    pieces = [Text(counted(status)), *([_bar(status)] if status.total else []), *map(Text, status.facts)]
    lines = [Text()]
    for piece in pieces:
        if lines[-1] and lines[-1].cell_len + len(_GAP) + piece.cell_len > width:
            if len(lines) == _MAX_LINES:
                break
            lines.append(Text())
        lines[-1].append_text(Text(_GAP if lines[-1] else "")).append_text(piece)
    for line in lines:
        line.truncate(max(1, width), overflow="ellipsis")
    return Text(_UNDER_SPINNER).join(lines)


def _bar(status: Status) -> Text:
    filled = min(_BAR, status.done * _BAR // status.total)
    return Text.assemble(("━" * filled, "green"), ("─" * (_BAR - filled), "bright_black"))
