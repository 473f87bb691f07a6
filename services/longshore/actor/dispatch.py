"""Gives every request a place at a generator, in the order in which they came: whoever has room first takes the next.

A request that finds no room waits here and not in a generator's queue, so that it is bound to one only when that one
can begin. Waiting ends at the caller's deadline, or once no generator has been usable for the caller's patience.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from longshore.actor.balancing import Balancer, Trouble
from longshore.errors import Unavailable

# How often who waits looks at the clock.
_LOOK_S = 1.0


@dataclass(eq=False)
class _Waiter:
    prefixes: Sequence[str]
    avoid: Collection[str]
    accepts: Callable[[int], bool] | None
    placed: asyncio.Future[str]


class Dispatch:
    """The places of one actor's generators. Belongs to one event loop."""

    def __init__(self, balancer: Balancer, clock: Callable[[], float]) -> None:
        self.balancer = balancer
        self._clock = clock
        # In the order in which they came; a dict, because any of them may leave.
        self._waiters: dict[_Waiter, None] = {}
        # Since when no generator is usable; None: one is.
        self._away_since: float | None = clock()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiters)

    async def place(
        self,
        prefixes: Sequence[str],
        avoid: Collection[str],
        until: float,
        patience_s: float,
        accepts: Callable[[int], bool] | None = None,
    ) -> str:
        """The generator whose place the caller has from now on, and must give back by `ended`.

        Args:
            prefixes, accepts: see Balancer.choose.
            avoid: generators to be avoided as long as another one serves.
            until: on our clock.

        Raises:
            Unavailable: there was none until then, or no generator was usable for `patience_s` seconds.
        """
        began = self._clock()
        waiter = _Waiter(prefixes, avoid, accepts, asyncio.get_running_loop().create_future())
        self._waiters[waiter] = None
        try:
            self.wake()
            while not waiter.placed.done():
                left = self._left(began, until, patience_s)
                await asyncio.wait((waiter.placed,), timeout=min(left, _LOOK_S))
            return waiter.placed.result()
        except asyncio.CancelledError:
            if waiter.placed.done():
                self.ended(waiter.placed.result())
            raise
        finally:
            self._waiters.pop(waiter, None)

    def _left(self, began: float, until: float, patience_s: float) -> float:
        self._look()
        now = self._clock()
        if now >= until:
            raise Unavailable("no generator had room within the time that a reply may take")
        if self._away_since is None:
            return until - now
        away = now - max(began, self._away_since)
        if away >= patience_s:
            raise Unavailable(f"no generator has been serving for {away:.0f} s")
        return min(until - now, patience_s - away)

    def ended(self, name: str, trouble: Trouble | None = None) -> None:
        """Gives a place back; see Balancer.ended."""
        self.balancer.ended(name, trouble)
        self.wake()

    def wake(self) -> None:
        """Places whom it can; to be called whenever a generator may have become usable or has room again."""
        self._look()
        for waiter in list(self._waiters):
            if not self.balancer.has_room():
                break
            name = self.balancer.choose(waiter.prefixes, self._avoided(waiter), waiter.accepts)
            if name is not None:
                self.balancer.sent(name, waiter.prefixes)
                del self._waiters[waiter]
                waiter.placed.set_result(name)
        self._set_timer()

    def _avoided(self, waiter: _Waiter) -> Collection[str]:
        """Who it waits for may have gone since."""
        return waiter.avoid if self.balancer.has_others(waiter.avoid) else ()

    def _look(self) -> None:
        if self.balancer.usable():
            self._away_since = None
        elif self._away_since is None:
            self._away_since = self._clock()

    def _set_timer(self) -> None:
        """The end of a generator's pause is nobody's call."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pause = self.balancer.next_pause_end() if self._waiters else None
        if pause is not None:
            self._timer = asyncio.get_running_loop().call_later(pause + 0.001, self.wake)
