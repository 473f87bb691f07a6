"""The learner's real intake over a real broker, between honest deliveries and poison."""

from __future__ import annotations

import itertools
import random
import resource
from collections import Counter
from collections.abc import Sequence

from poison import (
    CONTEXT,
    NEWEST_VERSION,
    TURN_TOKENS,
    VOCABULARY,
    Entry,
    Kind,
    body_of,
    entry_of,
    honest,
)
from redis.asyncio import Redis

from longshore.learner.broker_link import BrokerLink
from longshore.learner.intake import Intake, Limits
from longshore.learner.ledger import Ledger
from longshore.rollout_queue.dead_letters import DeadLetters
from longshore.rollout_queue.keys import JobKeys
from longshore.rollout_queue.rollouts import RolloutQueue
from longshore.rollout_queue.tickets import Claim, TicketQueue
from longshore.types import JobRef, Message, Purpose, Sampling, Task, Ticket, TicketRef

GROUP_SIZE = 4
_PIPELINE_BYTES = 4_000_000


class PoisonBench:
    """One job: its learner's books and intake, a forger with a way to the broker, and honest actors."""

    def __init__(self, client: Redis, job: JobRef) -> None:
        self.redis = client
        self.job = job
        self.keys = JobKeys(job)
        self.link = BrokerLink(client, job, "home", 5, 3600.0)
        self.ledger = Ledger()
        limits = Limits(VOCABULARY, CONTEXT, TURN_TOKENS, temperature=1.0)
        self.intake = Intake(self.link, self.ledger, job, limits)
        self.intake.newest_version = NEWEST_VERSION
        self.tickets = TicketQueue(client, job)
        self.rollouts = RolloutQueue(client, job)
        self.letters = DeadLetters(client, job)

    async def open(self, groups: int) -> list[Ticket]:
        """Issues tickets and returns them in order."""
        await self.link.open(at_least=1)
        tickets = []
        for number in range(groups):
            task = Task(f"task-{number}", (Message("user", f"Spell {number}"),), answer="x")
            group = self.ledger.issue(task, Purpose.TRAIN, GROUP_SIZE)
            for index in range(GROUP_SIZE):
                ref = TicketRef(self.job, group.group_id, index)
                tickets.append(Ticket(ref, GROUP_SIZE, Purpose.TRAIN, task, Sampling(1.0, TURN_TOKENS), 1, 1.0))
        await self.link.issue(tickets)
        return tickets

    async def claim_all(self) -> list[Claim]:
        """Every ticket, claimed by one actor."""
        claims: list[Claim] = []
        while more := await self.tickets.claim("actor-0", 500, 0):
            claims += more
        return claims

    async def forge(self, entries: Sequence[Entry]) -> None:
        """Adds entries to the rollouts stream, past every function."""
        pipeline, size = self.redis.pipeline(transaction=False), 0
        for fields in entries:
            pipeline.xadd(self.keys.rollouts, dict(fields))  # type: ignore[arg-type]
            size += sum(len(value) for value in fields.values() if not isinstance(value, int))
            if size > _PIPELINE_BYTES:
                await pipeline.execute()
                size = 0
        await pipeline.execute()

    async def deliver(self, claim: Claim, body: bytes) -> None:
        await self.rollouts.deliver(claim, body)

    async def take_in(self) -> int:
        """Reads until nothing is left. Returns how many entries there were."""
        total = 0
        while count := await self.intake.read(0):
            total += count
        return total

    async def reasons(self) -> Counter[str]:
        """Reasons of the dead letters that are kept."""
        found: Counter[str] = Counter()
        after = ""
        while page := await self.letters.list(after, 200):
            found.update(letter.reason for letter in page)
            after = page[-1].letter_id
        return found

    def check_books(self, honest_claims: Sequence[Claim], poisoned: Sequence[Claim]) -> None:
        """Everything honest is in, as it was sent; what was poisoned by its own holder was rejected; nothing else."""
        taken = {
            f"{group.group_id}.{index}": rollout
            for group in self.ledger.open.values()
            for index, rollout in group.rollouts.items()
        }
        assert taken.keys() == {claim.ticket.ref.key for claim in honest_claims}
        for claim in honest_claims:
            rollout = taken[claim.ticket.ref.key]
            assert rollout.segments[0].token_ids == (8, 9, 10, 11, 12, 13, 1)
            assert rollout.verdict is not None
            assert rollout.verdict.reward == claim.ticket.ref.index % 2
        rejected = {
            f"{group.group_id}.{index}"
            for group in self.ledger.open.values()
            for index, reason in group.final_reasons.items()
            if reason == "rejected"
        }
        assert rejected == {claim.ticket.ref.key for claim in poisoned}
        assert self.ledger.balanced


class Mixer:
    """Poison and honest deliveries in a random order that a seed reproduces."""

    def __init__(self, bench: PoisonBench, kinds: Sequence[Kind], seed: int) -> None:
        self._bench = bench
        self._kinds = itertools.cycle(kinds)
        self._deliverable = itertools.cycle([kind for kind in kinds if kind.deliverable])
        self._random = random.Random(seed)
        self.sent: Counter[str] = Counter()
        self.honest: list[Claim] = []
        self.poisoned: list[Claim] = []

    async def send(self, claims: Sequence[Claim], poison: int) -> None:
        """Sends every claim's rollout (one in eight is poison), `poison` forged entries among them, and replays."""
        entries: list[Entry] = []
        share = poison // max(1, len(claims))
        for claim in claims:
            entries += self._forged(claim.ticket, share)
            if len(entries) >= 200:
                await self._bench.forge(entries)
                entries.clear()
            if self._random.random() < 0.125:
                kind = next(self._deliverable)
                await self._bench.deliver(claim, body_of(kind, claim.ticket))
                self.poisoned.append(claim)
                self.sent[kind.name] += 1
            else:
                await self._bench.deliver(claim, honest(claim.ticket))
                self.honest.append(claim)
        await self._bench.forge(entries)

    def _forged(self, ticket: Ticket, count: int) -> list[Entry]:
        entries = []
        for _ in range(count):
            kind = next(self._kinds)
            entries.append(kind.make(ticket))
            self.sent[kind.name] += 1
        if self.honest and self._random.random() < 0.2:
            # What was delivered honestly, once more.
            again = self._random.choice(self.honest).ticket
            entries.append(entry_of(again, honest(again)))
            self.sent["a replay"] += 1
        self._random.shuffle(entries)
        return entries


def peak_mebibytes() -> float:
    """Most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
