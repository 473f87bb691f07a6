"""What a broker did with every ticket, told from its append-only file by the test's own bookkeeping.

Two kinds of knowledge are kept apart. *History* only grows: whatever a ticket was ever seen to go through, even if the
broker has forgotten it since. *Now* is what the broker holds, and goes back with it when its file loses its end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from chaos.aof import Command, Transaction

AT_WORK = frozenset({"queued", "running", "spooled"})
LIVE = AT_WORK | frozenset({"awaiting_verdict", "delivered"})
MAX_FAILURES = 20
_KEY = re.compile(rb"ls:\{([^}]*)\}:([a-z0-9-]+):(.+)", re.DOTALL)
_COUNT = re.compile(r"state:(.+)@(.+)")


class TicketView(NamedTuple):
    """What the broker's line of a ticket says; `nonce` tells its attempts apart, "" when the line names none."""

    state: str
    attempt: int
    site: str
    nonce: str


class Delivery(NamedTuple):
    """A rollout that entered the stream."""

    attempt: int
    digest: str
    site: str


@dataclass
class History:
    """What happened to the tickets of one queue, in order. Never rewound."""

    issued: Counter[str] = field(default_factory=Counter)
    deliveries: dict[str, list[Delivery]] = field(default_factory=dict)
    endings: dict[str, list[str]] = field(default_factory=dict)
    attempts: int = 0
    # Attempts that began while another held the ticket: its lease had run out.
    take_overs: int = 0
    given_back: int = 0
    # Tickets that the broker took for new although it had ended them and has not lost that since.
    issued_after_end: list[str] = field(default_factory=list)
    # Acts after which the equation was checked, and what was wrong.
    checks: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass
class Now:
    """What the broker holds of one queue."""

    tickets: dict[str, TicketView] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    # Of `tickets`: "state@site" -> number.
    held: Counter[str] = field(default_factory=Counter)
    # How many endings stand.
    num_ended: int = 0

    def copy(self) -> Now:
        return Now(dict(self.tickets), dict(self.counts), Counter(self.held), self.num_ended)

    def unbalanced(self) -> str:
        """How the ledger's equation fails; "" when it holds."""
        states = {name.removeprefix("state:"): number for name, number in self.counts.items() if name != "issued"}
        states.pop("bytes", None)
        issued = self.counts.get("issued", 0)
        if issued != sum(states.values()):
            return f"issued {issued} is not the sum of {states}"
        live = {name: number for name, number in states.items() if number and name.partition("@")[0] in LIVE}
        held = {name: number for name, number in self.held.items() if number}
        if live != held:
            return f"the counts say {live}, the tickets are {held}"
        return ""


class QueueShadow:
    """One job's queue at one site, as its broker's file tells it."""

    def __init__(self) -> None:
        self.history = History()
        self.now = Now()
        # Endings that the broker still knows of, in order: key -> outcome.
        self._standing: dict[str, str] = {}
        # Tickets that were deleted and whose outcome has not been told yet.
        self._ended: list[str] = []
        self._touched = False
        # What the counts were when they were deleted.
        self._deleted: dict[str, int] = {}

    def go_back(self, now: Now) -> None:
        """The broker lost what came after it had been so; the history stays."""
        self.now = now
        for key in list(self._standing)[now.num_ended :]:
            del self._standing[key]

    def take(self, name: bytes, command: Command) -> None:
        """One command on the key that the queue calls `name`."""
        verb = command[0].upper()
        if name == b"live":
            self._tickets(verb, command)
        elif name == b"counts":
            self._counts(verb, command)
        elif name == b"rollouts" and verb == b"XADD":
            self._delivered(_fields(command[_first_field(command) :]))

    def settle(self, where: str) -> None:
        """The end of a transaction: the equation must hold now."""
        if not self._touched:
            return
        self._touched = False
        if self._deleted and not self.now.counts:
            # Not made anew in the same act: the broker was told to forget a job that had ended.
            self.now.counts = self._deleted
        self._deleted = {}
        self.history.checks += 1
        wrong = self.now.unbalanced()
        if wrong and len(self.history.failures) < MAX_FAILURES:
            self.history.failures.append(f"{where}: {wrong}")

    def _tickets(self, verb: bytes, command: Command) -> None:
        if verb == b"HSET":
            for key, line in _fields(command[2:]).items():
                old, new = self.now.tickets.get(key), _view(line)
                self._observe(key, old, new)
                self._replace(key, old, new)
        elif verb == b"HDEL":
            self._ended = [key.decode() for key in command[2:] if key.decode() in self.now.tickets]
            self._drop(self._ended)
        elif verb in (b"DEL", b"UNLINK"):
            self._drop(list(self.now.tickets))

    def _drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._replace(key, self.now.tickets[key], None)

    def _observe(self, key: str, old: TicketView | None, new: TicketView) -> None:
        if old is None:
            self.history.issued[key] += 1
            # A rejected rollout ends its ticket at once; a learner that forgot that with its last seconds asks again.
            if self._standing.get(key, "rejected") != "rejected":
                self.history.issued_after_end.append(key)
        elif new.nonce not in ("", old.nonce):
            self.history.attempts += 1
            self.history.take_overs += old.state == "running"
        elif old.state == "running" and new.state == "queued":
            self.history.given_back += 1

    def _replace(self, key: str, old: TicketView | None, new: TicketView | None) -> None:
        self._touched = True
        if old is not None:
            self.now.held[f"{old.state}@{old.site}"] -= 1
        if new is None:
            del self.now.tickets[key]
        else:
            self.now.held[f"{new.state}@{new.site}"] += 1
            self.now.tickets[key] = new

    def _counts(self, verb: bytes, command: Command) -> None:
        self._touched = True
        if verb == b"HINCRBY":
            name, change = command[2].decode(), int(command[3])
            self.now.counts[name] = self.now.counts.get(name, 0) + change
            self._outcome(name, change)
        elif verb == b"HSET":
            self.now.counts.update({name: int(value) for name, value in _fields(command[2:]).items()})
        elif verb in (b"DEL", b"UNLINK"):
            self._deleted, self.now.counts = self.now.counts, {}

    def _outcome(self, name: str, change: int) -> None:
        """The function that ends tickets counts their outcome right after it deletes them."""
        found = _COUNT.fullmatch(name)
        if found and self._ended and change == len(self._ended) and found[1] not in LIVE:
            for key in self._ended:
                self.history.endings.setdefault(key, []).append(found[1])
                self._standing.pop(key, None)
                self._standing[key] = found[1]
            self.now.num_ended = len(self._standing)
            self._ended = []

    def _delivered(self, fields: dict[str, bytes]) -> None:
        if "rollout" not in fields:
            return
        _schema, key, attempt, site, _awaiting, _codec, digest = fields["rollout"].decode().split(" ")
        self.history.deliveries.setdefault(key, []).append(Delivery(int(attempt), digest, site))


class BrokerShadow:
    """All queues of one broker."""

    def __init__(self) -> None:
        # (project/job, site) -> queue.
        self.queues: dict[tuple[str, str], QueueShadow] = {}
        self.commands = 0

    def take(self, transactions: Sequence[Transaction], file: str) -> None:
        for transaction in transactions:
            touched = {self._take(command) for command in transaction.commands}
            self.commands += len(transaction.commands)
            for queue in touched - {None}:
                assert queue is not None
                queue.settle(f"{file} at {transaction.end}")

    def queue(self, job: str, site: str) -> QueueShadow:
        return self.queues.setdefault((job, site), QueueShadow())

    def save(self) -> dict[tuple[str, str], Now]:
        return {name: queue.now.copy() for name, queue in self.queues.items()}

    def restore(self, saved: dict[tuple[str, str], Now]) -> None:
        """The broker is back where it was; the history stays."""
        for name, queue in self.queues.items():
            queue.go_back(saved[name].copy() if name in saved else Now())

    def _take(self, command: Command) -> QueueShadow | None:
        if len(command) < 2:
            return None
        if command[0].upper() == b"FLUSHALL":
            raise ValueError("somebody emptied the broker")
        last: QueueShadow | None = None
        keys = command[1:] if command[0].upper() in (b"DEL", b"UNLINK") else command[1:2]
        for key in keys:
            found = _KEY.fullmatch(key)
            if found:
                last = self.queue(found[1].decode(), found[2].decode())
                last.take(found[3], command)
        return last


def _fields(parts: Sequence[bytes]) -> dict[str, bytes]:
    return {name.decode(): value for name, value in zip(parts[::2], parts[1::2], strict=True)}


def _view(line: bytes) -> TicketView:
    """A line of one of the two shapes that functions.lua tells; that of a delivered ticket has no nonce."""
    state, attempt, site, *words = line.decode().split(" ")
    nonce = words[3].strip("-") if state in AT_WORK else ""
    return TicketView(state, int(attempt), site, nonce)


def _first_field(command: Command) -> int:
    """Where an XADD's fields begin: behind the options and the entry's id."""
    return next(index for index in range(2, len(command)) if re.fullmatch(rb"\d+-\d+", command[index])) + 1
