"""A job between two real brokers and its relay process; learner and actors are played by the test."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import Service
from redis.asyncio import Redis

from longshore.errors import Fenced, Unavailable
from longshore.rollout_queue import broker
from longshore.rollout_queue.ledger import Ledger
from longshore.rollout_queue.rollouts import Delivery, End, RolloutQueue
from longshore.rollout_queue.tickets import Claim, TicketQueue
from longshore.settings import JobFile
from longshore.types import JobRef, Message, Purpose, Sampling, Task, Ticket, TicketRef

SITE = "west"
WAIT_S = 30.0


class Bridge:
    """One job, its two brokers and its relay."""

    def __init__(
        self,
        folder: Path,
        home: Any,
        west: Any,
        connect: Callable[..., Redis],
        resources: dict[str, object] | None = None,
        public_key: bytes = b"\xab" * 32,
        **settings: object,
    ) -> None:
        self.job = JobRef("default", f"job-{uuid.uuid4().hex[:8]}")
        self.home, self.west = home, west
        self.home_redis, self.west_redis = connect(home.url, patience_s=5), connect(west.url, patience_s=5)
        self.tickets, self.rollouts = TicketQueue(self.home_redis, self.job), RolloutQueue(self.home_redis, self.job)
        self.site_tickets = TicketQueue(self.west_redis, self.job, SITE, max_attempts=20)
        self.site_rollouts = RolloutQueue(self.west_redis, self.job, SITE)
        spec = {
            "name": "relaying",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "resources": resources or {},
            "sites": [{"name": SITE}],
        }
        document = {"project": "default", "job": self.job.job, "spec": spec, "learner_public_key": public_key.hex()}
        job_file = folder / "job.json"
        job_file.write_text(JobFile.model_validate(document).model_dump_json())
        # Nobody is the weight store: tickets and weights have nothing to do with each other.
        plain = {"site": SITE, "home_broker_url": home.url, "home_weights": "127.0.0.1:9"}
        self.relay = Service(
            "relay",
            folder,
            job_file=job_file,
            broker_url=west.url,
            weights_dir=folder / "weights",
            spool_dir=folder / "spool",
            **{"allowance": 40, **(settings if "site_file" in settings else {**plain, **settings})},
        )
        self.epoch = 0
        self.out: dict[str, Ticket] = {}
        # Key -> every payload or final reason that the learner read and had not acknowledged before.
        self.read: dict[str, list[Delivery]] = {}

    async def open(self, tickets: int) -> None:
        """The learner's start, at home; the relay is not started."""
        await self.tickets.setup()
        self.epoch = await self.tickets.open_epoch()
        await self.rollouts.reconcile(self.epoch, await broker.incarnation(self.home_redis), {})
        await self.issue(tickets)

    async def issue(self, count: int) -> None:
        for number in range(len(self.out), len(self.out) + count):
            ref = TicketRef(self.job, number, 0)
            task = Task(f"task-{number}", (Message("user", "?"),), "x")
            self.out[ref.key] = Ticket(ref, 1, Purpose.TRAIN, task, Sampling(1.0, 4), self.epoch, 1.0)
        await self.tickets.issue(self.epoch, list(self.out.values())[-count:])

    # -- the site's actors -------------------------------------------------------------------------------------------

    async def claims(self, count: int) -> list[Claim]:
        """That many claims of the site's actors."""
        found: list[Claim] = []
        async with asyncio.timeout(WAIT_S):
            while len(found) < count:
                found += await self.site_tickets.claim("actor-w", count - len(found), 200)
        return found

    async def deliver(self, claims: list[Claim], by: str = "west") -> None:
        for claim in claims:
            await self.site_rollouts.deliver(claim, payload(claim, by))

    async def work(self, until: asyncio.Event) -> None:
        """Site actors that work on whatever comes, through every restart of the broker, also on what others left."""
        while not until.is_set():
            with contextlib.suppress(Unavailable, Fenced):
                for claim in await self.site_tickets.take_over("actor-w", 10, 300):
                    await self.deliver([claim], "west again")
                for claim in await self.site_tickets.claim("actor-w", 5, 50):
                    await self.deliver([claim])

    # -- the learner ---------------------------------------------------------------------------------------------------

    async def learn(self, count: int) -> None:
        """Reads until it has seen that many tickets end, without acknowledging."""
        async with asyncio.timeout(WAIT_S):
            while len(self.read) < count:
                await self.read_some()

    async def read_some(self) -> None:
        for item in await self.rollouts.read(100, 100):
            self.read.setdefault(item.ticket_key, []).append(item)

    async def checkpoint(self) -> None:
        ends = [End(item.entry_id, key, "trained") for key, items in self.read.items() for item in items]
        await self.rollouts.acknowledge(self.epoch, ends)

    async def reconcile(self) -> None:
        """What a learner without a checkpoint does when it notices that its broker restarted."""
        await self.tickets.setup()
        await self.tickets.raise_epoch(self.epoch)
        await self.tickets.issue(self.epoch, list(self.out.values()))
        await self.rollouts.reconcile(self.epoch, await broker.incarnation(self.home_redis), {})

    # -- looking -------------------------------------------------------------------------------------------------------

    async def home_states(self) -> dict[str, int]:
        return await states(Ledger(self.home_redis, self.job))

    async def site_states(self) -> dict[str, int]:
        return await states(Ledger(self.west_redis, self.job, SITE))

    async def metric(self, name: str) -> float:
        lines = await asyncio.to_thread(scrape, self.relay.metrics_address)
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"longshore_relay_{name}{{"))

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    if await condition():
                        return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{what} did not come true: {self.relay.tail(30)}") from None

    async def until_metric(self, name: str, value: float) -> None:
        async def reached() -> bool:
            return await self.metric(name) == value

        await self.until(reached, f"{name} {value}")

    async def until_home(self, **wanted: int) -> None:
        async def reached() -> bool:
            return await self.home_states() == wanted

        await self.until(reached, f"home {wanted}")


def payload(claim: Claim, by: str) -> bytes:
    return f"{claim.ticket.ref.key} {by}".encode()


def scrape(address: str) -> list[str]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as reply:
        return reply.read().decode().splitlines()


async def states(ledger: Ledger) -> dict[str, int]:
    counts = await ledger.counts()
    assert counts.balanced, counts
    return {state: number for state, number in counts.states.items() if number}
