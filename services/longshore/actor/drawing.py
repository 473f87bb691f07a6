"""One reply, drawn by whichever generators it takes. Knows no gRPC: a `Source` opens the streams.

A stream that breaks, or that is moved away from a slow generator, costs no token that has come: another generator goes
on after them, as engines do when weights change in mid-reply. Nothing is raced and nothing that came is thrown away, so
what a reply becomes does not depend on which streams survived: drawing broken replies anew would favour short ones, for
the longer a reply is, the likelier it meets a break.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from longshore.actor.balancing import Trouble
from longshore.actor.dispatch import Dispatch
from longshore.actor.episode import AttemptFailed, Reply
from longshore.actor.moving import Flight, Mover
from longshore.actor.replies import ReplyBuilder
from longshore.errors import Rejected, Unavailable
from longshore.proto.v1 import generator_pb2
from longshore.types import Sampling, VersionConstraint

# Tries of one reply on which generators fail with an error that is not "away".
MAX_FAULTS = 5
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_ANY_VERSION = VersionConstraint()


class TryFailed(Exception):
    """A stream ended before the reply did."""

    def __init__(self, trouble: Trouble, text: str, *, refused: str = "") -> None:
        """
        Args:
            refused: `prompt` or `version` when the generator says that it cannot answer this request at all.
        """
        self.trouble = trouble
        self.refused = refused
        super().__init__(text)


@dataclass(frozen=True)
class Ask:
    """What a generator is asked for: a reply, or the rest of one."""

    # Never used twice: a generator may still be ending the request before.
    request_id: str
    token_ids: list[int]
    sampling: Sampling


@dataclass(frozen=True)
class Wanted:
    """A reply that a rollout wants."""

    # Unique to the turn; requests add a number.
    name: str
    token_ids: list[int]
    sampling: Sampling
    # What it shares with others, nearest first: the rollout's earlier turns, the group's prompt.
    prefixes: tuple[str, ...]
    version: VersionConstraint = field(default_factory=VersionConstraint)

    def accepts(self, version: int) -> bool:
        low, high = self.version.min_version, self.version.max_version
        return (low is None or low <= version) and (high is None or version <= high)


class Source(Protocol):
    """Opens streams to generators."""

    def stream(
        self, generator: str, wanted: Wanted, ask: Ask, timeout_s: float
    ) -> AsyncGenerator[generator_pb2.ReplyEvent]:
        """Ends after the reply's last event. Raises TryFailed."""


class DrawingObserver(Protocol):
    """Told of what did not go straight, for metrics."""

    def retried_generator(self) -> None: ...
    def moved(self, reason: str, tokens: int) -> None: ...


@dataclass(frozen=True)
class DrawLimits:
    """Seconds: that one reply may take in all, and that generators may be away before it has begun."""

    timeout_s: float
    patience_s: float


class Drawer:
    """Draws replies for any number of rollouts."""

    def __init__(
        self,
        source: Source,
        dispatch: Dispatch,
        mover: Mover,
        limits: DrawLimits,
        observer: DrawingObserver,
        clock: Callable[[], float],
    ) -> None:
        self.source = source
        self.dispatch = dispatch
        self.mover = mover
        self.limits = limits
        self.observer = observer
        self.clock = clock

    async def draw(self, wanted: Wanted) -> Reply:
        """The whole reply.

        Raises:
            Rejected: reason `prompt` when a generator refuses the request, `version` when none in use can serve the
                versions that it may be answered by.
            AttemptFailed: generators failed on it again and again.
            Unavailable: no generator could finish it within the patience, or in the time that a reply may take.
        """
        reply = await _Drawing(self, wanted).run()
        self.mover.earned(len(wanted.token_ids) + len(reply.token_ids))
        return reply


class _Drawing:
    """One reply on its way."""

    def __init__(self, drawer: Drawer, wanted: Wanted) -> None:
        self._drawer = drawer
        self._wanted = wanted
        self._builder = ReplyBuilder()
        self._deadline = drawer.clock() + drawer.limits.timeout_s
        self._tries = 0
        self._faults = 0
        # Generators that have just failed us, and those that no longer have our versions.
        self._avoid: set[str] = set()
        self._refused: set[str] = set()
        # Of the failures since the last token.
        self._failing_since: float | None = None
        self._pause = _FIRST_PAUSE_S

    async def run(self) -> Reply:
        while True:
            reply = self._builder.reply()
            if reply is not None:
                return reply
            avoid = frozenset(self._avoid | self._refused)
            wanted = self._wanted
            accepts = None if wanted.version == _ANY_VERSION else wanted.accepts
            name = await self._drawer.dispatch.place(wanted.prefixes, avoid, self._deadline, self._patience_s, accepts)
            had = len(self._builder.token_ids)
            try:
                await self._try(name)
            except TryFailed as failure:
                # What broke off may need nothing more.
                self._builder.close(wanted.sampling)
                if self._builder.reply() is None:
                    await self._after(name, failure, len(self._builder.token_ids) > had)

    @property
    def _patience_s(self) -> float:
        """Tokens that have come are waited for until the deadline: who gave them up for another attempt would draw long
        replies anew, and keep short ones, which are seldom in mid-reply when the generators go away."""
        return math.inf if self._builder.token_ids else self._drawer.limits.patience_s

    async def _try(self, name: str) -> None:
        """One stream; its place is given back. Raises TryFailed."""
        drawer = self._drawer
        drawn = list(self._builder.token_ids)
        ask = Ask(
            f"{self._wanted.name}/{self._tries}",
            self._wanted.token_ids + drawn,
            replace(self._wanted.sampling, max_new_tokens=self._wanted.sampling.max_new_tokens - len(drawn)),
        )
        self._tries += 1
        flight = drawer.mover.flight(name, len(ask.token_ids), self._tries)
        task = asyncio.create_task(self._follow(name, ask, flight), name=f"draw-{ask.request_id}")
        flight.cancel = task.cancel
        trouble: Trouble | None = None
        try:
            await task
        except TryFailed as failure:
            trouble = failure.trouble
            raise
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if not flight.moved or (current is not None and current.cancelling()):
                raise
            cost = len(self._wanted.token_ids) + len(self._builder.token_ids)
            drawer.observer.moved(flight.moved, cost)
            raise TryFailed(Trouble.LATE, f"moved away from {name}: {flight.moved}") from None
        finally:
            drawer.mover.landed(flight)
            drawer.dispatch.ended(name, trouble)

    async def _follow(self, name: str, ask: Ask, flight: Flight) -> None:
        drawer, builder = self._drawer, self._builder
        builder.begin()
        timeout_s = max(0.0, self._deadline - drawer.clock())
        async with aclosing(drawer.source.stream(name, self._wanted, ask, timeout_s)) as events:
            async for event in events:
                self._check(event)
                try:
                    builder.add(event)
                except Rejected as error:
                    raise TryFailed(Trouble.FAULT, f"{name}: {error.detail}") from None
                if event.token_ids:
                    flight.progress.drew(len(event.token_ids))
                    drawer.dispatch.balancer.gave_tokens(name)
        # What ended without saying so may need nothing more, all the same.
        builder.close(self._wanted.sampling)
        if builder.reply() is None:
            raise TryFailed(Trouble.AWAY, "the reply broke off")

    def _check(self, event: generator_pb2.ReplyEvent) -> None:
        """An answer by another version than asked for, or of more tokens, must not become part of a rollout."""
        if event.token_ids and not self._wanted.accepts(event.policy_version):
            bounds = self._wanted.version
            raise TryFailed(
                Trouble.FAULT,
                f"version {event.policy_version} answered; {bounds.min_version}..{bounds.max_version} was asked for",
            )
        if len(self._builder.token_ids) + len(event.token_ids) > self._wanted.sampling.max_new_tokens:
            raise TryFailed(Trouble.FAULT, f"more than {self._wanted.sampling.max_new_tokens} tokens came")

    async def _after(self, name: str, failure: TryFailed, progressed: bool) -> None:
        """Prepares how the reply goes on after a failed try. Raises what `draw` raises when it does not."""
        self._judge(name, failure)
        if progressed:
            self._failing_since, self._pause = None, _FIRST_PAUSE_S
            self._avoid.clear()
        # One that drew as long as it draws for anybody holds the prefix, and may go on.
        if not (progressed and failure.trouble is Trouble.REQUEST):
            self._avoid.add(name)
        now = self._drawer.clock()
        self._failing_since = now if self._failing_since is None else self._failing_since
        away = now - self._failing_since
        if away >= self._patience_s or now >= self._deadline:
            raise Unavailable(f"away for {away:.0f} s: generator: {failure}")
        if failure.trouble is not Trouble.LATE:
            self._drawer.observer.retried_generator()
        if not self._drawer.dispatch.balancer.has_room(self._avoid | self._refused):
            # Nobody else can go on at once. Spread out, so that one that comes back is not met by everybody at once.
            self._avoid.clear()
            await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)

    def _judge(self, name: str, failure: TryFailed) -> None:
        """Raises when no other try can help."""
        if failure.refused == "prompt" and not self._builder.token_ids:
            raise Rejected("prompt", str(failure))
        if failure.refused == "version":
            self._refused.add(name)
            if not self._drawer.dispatch.balancer.has_others(self._refused):
                raise Rejected("version", str(failure))
        # What was begun elsewhere and is refused here is the generator's difference, not the prompt's fault.
        if failure.trouble is Trouble.FAULT or failure.refused == "prompt":
            self._faults += 1
            if self._faults >= MAX_FAULTS:
                raise AttemptFailed("generator_failed", str(failure))
