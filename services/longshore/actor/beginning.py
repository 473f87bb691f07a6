"""How an attempt begins: fresh, resumed where an earlier one's journal ends, or anew although there is a journal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog

from longshore.actor.episode import Behind, Keeper, KeepsNothing, Surroundings
from longshore.actor.journal_codec import Journaled, Terms, read_journal
from longshore.actor.journaling import JournalStore, TurnJournal
from longshore.actor.resume import CannotResume, Resumed, resume
from longshore.actor.retry import persist
from longshore.errors import IntegrityError, Rejected, Unavailable
from longshore.rollout_queue.tickets import Claim
from longshore.tasks.rendering import Renderer
from longshore.types import Sampling

log = structlog.get_logger()

# A rollout of one turn has nothing between its reply and its delivery but the score. Keeping the reply costs a round
# trip and its bytes a second time; drawing it anew costs less than that unless a score may take longer than this.
LONG_SCORE_S = 60.0

FRESH, RESUMED, RESTARTED = "fresh", "resumed", "restarted"
_NOTHING = Behind([], [])


class BeginningObserver(Protocol):
    """Told how attempts begin and what their journals were good for, for metrics."""

    def began(self, start: str) -> None: ...
    def journal_used(self, fate: str, turns: int, tokens: int) -> None: ...
    def not_journaled(self, reason: str) -> None: ...


@dataclass(frozen=True)
class Beginning:
    """What an attempt starts with; `behind` None: nothing has been played."""

    surroundings: Surroundings
    keeper: Keeper
    behind: Behind | None
    # Unix seconds at which the first of the attempts started that this one goes on with.
    started_at: float


@dataclass(frozen=True)
class Beginner:
    """Begins the attempts of one actor.

    Args:
        store: None: attempts keep no journal.
        renderer_digest: what tells one renderer's tokens from another's.
    """

    store: JournalStore | None
    renderer: Renderer
    renderer_digest: str
    max_turns: int
    make_surroundings: Callable[[], Surroundings]
    broker_patience_s: float
    observer: BeginningObserver

    async def begin(self, claim: Claim, sampling: Sampling) -> Beginning:
        """Raises Unavailable when the broker stays away."""
        started_at = time.time()
        if self.store is None:
            self.observer.began(FRESH)
            return Beginning(self.make_surroundings(), KeepsNothing(), None, started_at)
        terms = Terms(self.renderer_digest, sampling)
        resumed = await self._resumed(self.store, claim, terms)
        if resumed is not None:
            started_at = resumed.journaled.started_at
        keeper = TurnJournal(self.store, claim, terms, started_at, self.observer.not_journaled)
        if resumed is None:
            return Beginning(self.make_surroundings(), keeper, None, started_at)
        keeper.go_on(resumed.journaled)
        return Beginning(resumed.surroundings, keeper, resumed.journaled.behind, started_at)

    async def _resumed(self, store: JournalStore, claim: Claim, terms: Terms) -> Resumed | None:
        # A journal ends with its ticket, so a first attempt has none to read.
        found: list[bytes] = []
        journaled: Journaled | None = None
        try:
            if claim.attempt > 1:
                found = await persist(partial(store.read, claim), self.broker_patience_s)
            if not found:
                self.observer.began(FRESH)
                return None
            journaled = read_journal(found, terms)
            task = claim.ticket.task
            resumed = await resume(journaled, task, self.max_turns, self.renderer, self.make_surroundings)
        except (Rejected, IntegrityError, CannotResume) as error:
            log.info("starting anew", ticket=claim.ticket.ref.key, attempt=claim.attempt, reason=str(error))
            self._count(RESTARTED, journaled.behind if journaled else _NOTHING, _NOTHING)
            # The first turn would replace it; until then it must not be found, and counted, once more.
            with contextlib.suppress(Unavailable):
                await store.clear(claim)
            return None
        log.info(
            "resumed", ticket=claim.ticket.ref.key, attempt=claim.attempt, turns=len(resumed.journaled.behind.turns)
        )
        self._count(RESUMED, journaled.behind, resumed.journaled.behind)
        return resumed

    def _count(self, start: str, found: Behind, used: Behind) -> None:
        self.observer.began(start)
        self.observer.journal_used("saved", len(used.turns), used.num_sampled)
        self.observer.journal_used("lost", len(found.turns) - len(used.turns), found.num_sampled - used.num_sampled)


def keeps_journal(one_turn: bool, score_timeout_s: float) -> bool:
    """Whether a job's rollouts are worth a journal."""
    return not one_turn or score_timeout_s > LONG_SCORE_S
