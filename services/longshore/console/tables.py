"""Plain tables in text. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """Lines with columns of equal width; with `right`, all but the first column are flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def shortened(text: str, width: int) -> str:
    """Text on one line of at most `width` characters, without control characters: parts of it are a stranger's."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= width else line[: max(0, width - 3)] + "..."
