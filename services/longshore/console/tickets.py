"""The commands about a job's tickets: where each of them is, and what was set aside."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime

from longshore.api_types import LedgerView, LetterView, WholeLetter
from longshore.console.commands import open_client
from longshore.console.follow import EXIT_BAD_INPUT, EXIT_OK
from longshore.console.tables import aligned, shortened
from longshore.errors import Conflict, NotFound

# Column -> the state that it counts. Everything else is a final reason, told below the table.
_COLUMNS = {
    "QUEUED": "queued",
    "RUNNING": "running",
    "SPOOLED": "spooled",
    "UNJUDGED": "awaiting_verdict",
    "DONE": "delivered",
    "TRAINED": "trained",
}
_OTHER = "OTHER"


async def ledger(job_id: str, as_json: bool) -> int:
    """Prints a small table by site, and whether it adds up."""
    with _one_line() as outcome:
        async with open_client() as client:
            view = await client.ledger(job_id)
        _write_json(view) if as_json else _write(ledger_lines(job_id, view))
    return outcome[0]


async def list_letters(job_id: str, as_json: bool) -> int:
    """Prints one line a letter."""
    with _one_line() as outcome:
        async with open_client() as client:
            letters = [letter async for letter in client.dead_letters(job_id)]
        if as_json:
            _write_json(letters)
        elif letters:
            _write(letter_lines(letters, shutil.get_terminal_size((80, 24)).columns))
        else:
            sys.stderr.write("no dead letters\n")
    return outcome[0]


async def show_letter(job_id: str, letter_id: str, as_json: bool) -> int:
    """Prints one letter."""
    with _one_line() as outcome:
        async with open_client() as client:
            letter = await client.dead_letter(job_id, letter_id)
        _write_json(letter) if as_json else _write(letter_text(letter))
    return outcome[0]


async def requeue(job_id: str, letter_ids: Sequence[str]) -> int:
    """Asks for each letter in turn; stops at the first that cannot be had."""
    if not letter_ids:
        sys.stderr.write("longshore: say which dead letters; `longshore dead-letters list` shows them\n")
        return EXIT_BAD_INPUT
    with _one_line() as outcome:
        async with open_client() as client:
            for letter_id in letter_ids:
                await client.requeue(job_id, letter_id)
                sys.stdout.write(f"{letter_id} will be attempted again\n")
    return outcome[0]


def ledger_lines(job_id: str, view: LedgerView) -> list[str]:
    """The table of a ledger, within 80 columns for counts below ten million."""
    states, by_site = view["states"], view["by_site"]
    known = set(_COLUMNS.values())
    rows = [("SITE", *_COLUMNS, _OTHER, "ISSUED")]
    for site, counts in [*sorted(by_site.items()), *([("all", states)] if len(by_site) != 1 else [])]:
        other = sum(count for state, count in counts.items() if state not in known)
        numbers = [*(counts.get(state, 0) for state in _COLUMNS.values()), other, sum(counts.values())]
        rows.append((shortened(site, 14), *(str(number) for number in numbers)))
    reasons = sorted((state, count) for state, count in states.items() if state not in known and count)
    lines = [f"{job_id}: {view['issued']} tickets issued, {_verdict(view)}", "", *aligned(rows, right=True)]
    if reasons:
        lines += ["", f"{_OTHER.lower()}: " + ", ".join(f"{state} {count}" for state, count in reasons)]
    if view["bytes_waiting"]:
        lines.append(f"waiting for the learner: {view['bytes_waiting'] / 1e6:.1f} MB of rollouts")
    if view["learner"]:
        learner = view["learner"]
        lines.append(f"the learner's own books: {learner['issued']} issued at train step {learner['at_step']}")
    return lines


def _verdict(view: LedgerView) -> str:
    if view["balanced"]:
        return "each in exactly one state"
    return f"but {sum(view['states'].values())} in the states: THE LEDGER DOES NOT ADD UP"


def letter_lines(letters: Sequence[LetterView], width: int) -> list[str]:
    """One line a letter, of at most `width` columns."""
    rows = [("LETTER", "WHEN", "TICKET", "SITE", "REASON", "DETAIL")]
    for letter in letters:
        when = datetime.fromisoformat(letter["at"]).astimezone().strftime("%m-%d %H:%M")
        rows.append((letter["id"], when, letter["ticket"], letter["site"], letter["reason"], letter["detail"]))
    plain = [tuple(shortened(cell, 24 if column < 5 else 1000) for column, cell in enumerate(row)) for row in rows]
    return [shortened(line, width) for line in aligned(plain)]


def letter_text(letter: WholeLetter) -> list[str]:
    """Everything that a person wants to know of a letter."""
    task = letter["task"]
    rows = [
        ("letter", f"{letter['id']}  ({letter['kind']}, {letter['at']})"),
        ("ticket", f"{letter['ticket']}, attempt {letter['attempt']}, site {letter['site'] or '-'}"),
        ("reason", letter["reason"]),
        ("detail", letter["detail"] or "-"),
        ("payload", f"{letter['payload_bytes']} bytes" + ("; --json prints it" if letter["payload"] else "")),
        ("task", task["id"] if task else "unknown: it cannot be requeued"),
    ]
    for message in task["messages"] if task else []:
        rows.append(("", f"{message['role']}: {message['content']}"))
    return [f"{label:<8}  {shortened(text, 2000)}".rstrip() for label, text in rows]


@contextlib.contextmanager
def _one_line() -> Iterator[list[int]]:
    """Turns what was asked for and is not there into one line and the exit code of wrong input."""
    outcome = [EXIT_OK]
    try:
        yield outcome
    except (NotFound, Conflict) as error:
        sys.stderr.write(f"longshore: {' '.join(str(error).split())}\n")
        outcome[0] = EXIT_BAD_INPUT


def _write(lines: Sequence[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _write_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
