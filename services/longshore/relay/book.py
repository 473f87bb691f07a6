"""What a relay knows of its tickets: the one thing that its two sides share.

The home side says which tickets are ours; the site side makes the site's broker match that. A ticket is, for us:

    held                      leased to us, and not handed in: in work at the site, or waiting in the spool
    at_site                   not ended at the site's broker, as far as we know
    judged                    not held, and home would not give it to us: it has ended or is somebody else's
    surplus                   judged, and still at the site: to be ended there

Nothing here is durable: all of it is found again in the home broker, the site's broker and the spool.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from longshore.rollout_queue.spool import Spool
from longshore.rollout_queue.tickets import Claim


@dataclass
class Book:
    """One relay's state; every part of it belongs to one event loop."""

    spool: Spool
    held: dict[str, Claim] = field(default_factory=dict)
    at_site: set[str] = field(default_factory=set)
    judged: set[str] = field(default_factory=set)
    surplus: set[str] = field(default_factory=set)
    # Whether `held` is what home says, since its last restart.
    home_known: bool = False
    # Whether `at_site` is what the site's broker says, since its last restart.
    site_known: bool = False
    spool_full: bool = False
    # Something may have become ready to be handed in.
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    # Monotonic seconds at which this process spooled or found what is not handed in yet.
    _since: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spooled(self.spool.keys())

    # -- the home side ---------------------------------------------------------------------------------------------

    def take(self, claims: Iterable[Claim]) -> None:
        """These tickets are ours now."""
        for claim in claims:
            key = claim.ticket.ref.key
            self.held[key] = claim
            self.judged.discard(key)
            self.surplus.discard(key)
        self.ready.set()

    def release(self, claim: Claim) -> None:
        """This claim is handed in, or lost; a newer one of the same ticket stays."""
        key = claim.ticket.ref.key
        if self.held.get(key) is claim:
            del self.held[key]

    def judge(self, keys: Iterable[str]) -> None:
        """Home does not give us these."""
        for key in keys:
            if key not in self.held:
                self.judged.add(key)
                self._since.pop(key, None)
                if key in self.at_site and key not in self.spool:
                    self.surplus.add(key)

    def forget(self, keys: Iterable[str]) -> None:
        """These are covered: nobody needs their rollouts from us any more."""
        gone = list(keys)
        self.spool.forget(gone)
        for key in gone:
            self._since.pop(key, None)
            # Should the site's broker still have it, it is asked about once more.
            self.judged.discard(key)

    def doubt(self) -> None:
        """Home's broker restarted: whatever it said may be forgotten."""
        self.judged.clear()
        self.home_known = False

    @property
    def unclaimed(self) -> list[str]:
        """Tickets that we have work of, and neither hold nor have asked home about."""
        keys = [*self.spool.keys(), *(key for key in self.at_site if key not in self.spool)]
        return [key for key in keys if key not in self.held and key not in self.judged]

    @property
    def parked(self) -> list[str]:
        """Spooled, not ours to hand in: handed in already, or somebody else's. They wait until they are covered."""
        return [key for key in self.judged if key in self.spool]

    def to_hand_in(self, busy: set[str], count: int) -> list[Claim]:
        """Up to `count` claims whose record is spooled, but for the keys in `busy`."""
        found: list[Claim] = []
        for key, claim in self.held.items():
            if key in self.spool and key not in busy:
                found.append(claim)
                if len(found) >= count:
                    break
        return found

    def handed_in(self, key: str) -> None:
        self._since.pop(key, None)

    # -- the site side ---------------------------------------------------------------------------------------------

    def to_issue(self) -> list[Claim]:
        """Ours, and neither at the site nor finished."""
        return [claim for key, claim in self.held.items() if key not in self.at_site and key not in self.spool]

    def spooled(self, keys: Iterable[str]) -> None:
        """Records of these are in the spool."""
        now = time.monotonic()
        for key in keys:
            self._since.setdefault(key, now)
            self.surplus.discard(key)
        self.ready.set()

    def ended_at_site(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.at_site.discard(key)
            self.surplus.discard(key)
            if key not in self.spool:
                self.judged.discard(key)

    @property
    def oldest_s(self) -> float:
        """Age of the oldest record that is not handed in; 0: there is none."""
        return time.monotonic() - min(self._since.values()) if self._since else 0.0
