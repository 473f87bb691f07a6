"""One attempt's journal: every finished turn goes to the broker of the site, so that another actor can go on from it.

Keeping a turn never fails an attempt, unless the attempt is no longer ours: what the broker cannot take now goes along
with the next turn, and what it will not take at all is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import structlog

from longshore.actor.episode import AttemptFailed, PlayedTurn, Surroundings
from longshore.actor.journal_codec import Journaled, Terms, head_to_proto, turn_to_proto
from longshore.errors import Rejected, Unavailable
from longshore.proto.v1 import journal_pb2
from longshore.rollout_queue.tickets import Claim
from longshore.tasks.environment import Restoring
from longshore.types import Message

log = structlog.get_logger()

# Bytes of snapshots that a newer one has made useless, before the journal is written anew without them.
MAX_STALE_BYTES = 4 * 1024 * 1024
_GAP = "gap"


class JournalStore(Protocol):
    """What an attempt needs of rollout_queue.Journal."""

    async def append(self, claim: Claim, index: int, turn: bytes) -> None: ...
    async def read(self, claim: Claim) -> list[bytes]: ...
    async def clear(self, claim: Claim) -> None: ...


class TurnJournal:
    """Keeps the turns of one attempt; an episode's Keeper.

    Args:
        on_failure: told, by a short stable word, why a turn was not kept (yet).
    """

    def __init__(
        self, store: JournalStore, claim: Claim, terms: Terms, started_at: float, on_failure: Callable[[str], None]
    ) -> None:
        self._store = store
        self._claim = claim
        self._terms = terms
        self._started_at = started_at
        self._on_failure = on_failure
        self._opening: list[Message] = []
        self._turns: list[PlayedTurn] = []
        # Entries in the journal, the turns in them, and the bytes of their snapshots.
        self._entries = 0
        self._kept = 0
        self._snapshot_bytes = 0
        self._takes_snapshots = True
        self._given_up = False

    def begin(self, opening: list[Message]) -> None:
        """Starts anew: the first turn takes the place of whatever the journal holds."""
        self._opening = list(opening)

    def go_on(self, journaled: Journaled) -> None:
        """Goes on after these entries; later ones are replaced."""
        self._opening = journaled.opening
        self._turns = journaled.behind.turns
        self._entries, self._kept = len(journaled.entries), len(self._turns)
        self._snapshot_bytes = sum(len(entry.snapshot or b"") for entry in journaled.entries)

    async def keep(self, turn: PlayedTurn, surroundings: Surroundings) -> None:
        """Returns when the turn is at the broker, or it is known that it is not to be.

        Raises:
            Fenced: the claim is no longer held.
        """
        self._turns.append(turn)
        if self._given_up:
            return
        goes_on = not turn.observation.done and bool(turn.observation.messages)
        snapshot = await self._snapshot(surroundings) if goes_on else None
        if snapshot is not None and self._snapshot_bytes > MAX_STALE_BYTES:
            self._rewind()
        try:
            await self._append(snapshot)
        except Unavailable as error:
            # Also when its memory is full. The rollout goes on; the next turn takes this one along.
            log.debug("turn not journaled yet", ticket=self._claim.ticket.ref.key, reason=str(error))
            self._on_failure("unavailable")
        except Rejected as error:
            self._give_up(error.reason, error.detail)
        except (TypeError, ValueError) as error:
            # What the environment said cannot be written down.
            self._give_up("malformed", str(error))

    async def _snapshot(self, surroundings: Surroundings) -> bytes | None:
        if surroundings.restoring is not Restoring.SNAPSHOT or not self._takes_snapshots:
            return None
        try:
            return await surroundings.snapshot()
        except AttemptFailed as error:
            # Once is enough: one that hangs would cost its deadline at every turn.
            self._takes_snapshots = False
            log.warning("no snapshot", ticket=self._claim.ticket.ref.key, reason=str(error))
            self._on_failure("snapshot")
            return None

    async def _append(self, snapshot: bytes | None) -> None:
        try:
            await self._write(snapshot)
        except Rejected as error:
            if error.reason != _GAP:
                raise
            # The broker lost its tail, and with it some of our entries.
            self._rewind()
            await self._write(snapshot)

    async def _write(self, snapshot: bytes | None) -> None:
        turns = self._turns[self._kept :]
        entry = journal_pb2.JournalEntry(turns=[turn_to_proto(turn) for turn in turns], snapshot=snapshot)
        if self._entries == 0:
            entry.head.CopyFrom(head_to_proto(self._terms, self._opening, self._started_at))
        await self._store.append(self._claim, self._entries, entry.SerializeToString())
        self._entries += 1
        self._kept += len(turns)
        self._snapshot_bytes += len(snapshot or b"")

    def _rewind(self) -> None:
        """The next entry takes the place of all there are: one that holds every turn, and one snapshot."""
        self._entries = self._kept = self._snapshot_bytes = 0

    def _give_up(self, reason: str, detail: str) -> None:
        log.warning("journal given up", ticket=self._claim.ticket.ref.key, reason=reason, detail=detail)
        self._given_up = True
        self._on_failure(reason)
