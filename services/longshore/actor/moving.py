"""Moves replies away from generators that are slow (pace.py says when), or that have fallen silent. No gRPC."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longshore.actor.balancing import Balancer
from longshore.actor.pace import Budget, Paces, Progress

SLOW, SILENT = "slow", "silent"
# Tries of one reply after which it stays where it is, however slow that is.
_MAX_TRIES = 3


@dataclass(eq=False)
class Flight:
    """One stream that is being drawn."""

    generator: str
    # Of the prompt and of what was drawn before: what another generator would compute again.
    tokens: int
    number: int
    progress: Progress
    cancel: Callable[[], object] = lambda: None
    # Why it is being moved; empty: it is not.
    moved: str = ""

    def move(self, reason: str) -> None:
        self.moved = reason
        self.cancel()


class Mover:
    """Watches all streams of one actor."""

    def __init__(self, balancer: Balancer, clock: Callable[[], float]) -> None:
        self._balancer = balancer
        self._clock = clock
        self._paces: dict[str, Paces] = {}
        self._flights: set[Flight] = set()
        self._budget = Budget()

    def flight(self, generator: str, tokens: int, number: int) -> Flight:
        """A stream begins: the `number`th of its reply."""
        paces = self._paces.setdefault(generator, Paces())
        flight = Flight(generator, tokens, number, Progress(paces, tokens, self._clock))
        self._flights.add(flight)
        return flight

    def landed(self, flight: Flight) -> None:
        self._flights.discard(flight)
        if not flight.moved:
            flight.progress.ended()

    def earned(self, tokens: int) -> None:
        """A reply was finished; tokens given and sampled."""
        self._budget.earned(tokens)

    def forget(self, generator: str) -> None:
        self._paces.pop(generator, None)

    def look(self) -> None:
        """Moves what is late, as far as others have room and the budget lasts."""
        taken: dict[str, int] = {}
        targets: dict[str, str | None] = {}
        for flight in list(self._flights):
            if flight.moved or flight.number >= _MAX_TRIES:
                continue
            source = flight.generator
            if source not in targets:
                targets[source] = self._balancer.choose((), avoid=(source,))
            target = targets[source]
            paces = self._paces.get(target) if target is not None else None
            if target is None or paces is None or not flight.progress.is_late(paces):
                continue
            if taken.get(target, 0) < self._balancer.room(target) and self._budget.spend(flight.tokens):
                taken[target] = taken.get(target, 0) + 1
                flight.move(SLOW)

    def silent(self, generator: str) -> None:
        """A generator does not answer at all: nothing is lost by going on elsewhere, whatever it costs."""
        for flight in list(self._flights):
            if flight.generator == generator and not flight.moved:
                flight.move(SILENT)
