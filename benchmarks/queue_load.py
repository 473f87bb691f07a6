"""One process of the queue's benchmark: a sender of rollouts, a receiver, or both; through our queue or past it.

`python -m benchmarks.queue_load '{"role": "send", ...}'` prepares, prints a line, waits for a line, does its work and
prints what it measured. Times are of the system's monotonic clock, which all processes of a machine share.

    sender     ours  deliver_many of claims that it took while preparing   bare  XADD, a pipeline for each batch
    receiver   ours  read, acknowledge                                     bare  XREADGROUP, XACK

Both use the same client with the same settings, send the same bytes in the same batches, two batches at a time.
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from redis.asyncio import Redis

from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import JobKeys
from longshore.rollout_queue.rollouts import End, RolloutQueue
from longshore.rollout_queue.site_leases import SiteLeases
from longshore.rollout_queue.tickets import Claim, TicketQueue
from longshore.types import JobRef, Message, Purpose, Sampling, Task, Ticket, TicketRef

JOB = JobRef("default", "queue-benchmark")
SENDERS = 2
_STAMP = struct.Struct("d")
_GROUP_SIZE = 8
_BARE = "bare"
_GIVE_UP_S = 120.0
_TICK_S = 0.001


@dataclass(frozen=True)
class Order:
    """What one process is to do. `rate` 0: as fast as it goes. `site` empty: home's actors, else a site's relay."""

    role: str
    ours: bool
    url: str
    count: int
    batch: int = 64
    size: int = 16 * 1024
    rate: float = 0.0
    site: str = ""
    seed: int = 0

    def argv(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.queue_load", json.dumps(asdict(self))]


@dataclass
class Done:
    """What one process measured: when it began and ended, its processor time, latencies of a paced run."""

    began: float
    ended: float
    processor_s: float
    # Claiming the tickets, before it began.
    claim_s: float
    latencies: list[float]


Deliver = Callable[[int, list[bytes]], Awaitable[None]]
Take = Callable[[], Awaitable[list[bytes]]]


def tickets(count: int) -> list[Ticket]:
    """The tickets of a run, in groups."""
    task = Task("task-1", (Message("user", "What is 6 times 7? " * 20),), answer="42")
    return [
        Ticket(
            TicketRef(JOB, number // _GROUP_SIZE, number % _GROUP_SIZE),
            _GROUP_SIZE,
            Purpose.TRAIN,
            task,
            Sampling(1.0, 4096, (1,)),
            learner_epoch=1,
            issued_at=1_700_000_000.0,
        )
        for number in range(count)
    ]


def payloads(size: int, seed: int) -> list[bytes]:
    """A few bodies that do not compress, as packed rollouts do not."""
    source = random.Random(seed)
    return [source.randbytes(size - _STAMP.size) for _ in range(16)]


async def prepare(url: str, count: int) -> float:
    """Empties the broker, makes both streams, issues the tickets. Returns how long issuing took."""
    redis = broker.connect(url)
    await redis.flushall()
    await redis.xgroup_create(_BARE, "learner", id="0", mkstream=True)
    queue = TicketQueue(redis, JOB)
    await queue.setup()
    epoch, began = await queue.open_epoch(), time.monotonic()
    await queue.issue(epoch, tickets(count))
    took = time.monotonic() - began
    await redis.aclose()
    return took


class Sender:
    """Sends the rollouts of one run."""

    def __init__(self, order: Order, redis: Redis) -> None:
        self._order = order
        self._redis = redis
        self._bodies = payloads(order.size, order.seed)
        self._claims: list[Claim] = []
        self._rollouts = RolloutQueue(redis, JOB, maker=order.site)

    async def prepare(self) -> None:
        while self._order.ours and len(self._claims) < self._order.count:
            self._claims += await self._claim(min(500, self._order.count - len(self._claims)))

    async def run(self) -> list[float]:
        if self._order.rate:
            await self._paced(time.monotonic())
        else:
            numbers = iter(range(0, self._order.count, self._order.batch))
            await asyncio.gather(*(self._flood(numbers) for _ in range(SENDERS)))
        return []

    async def _claim(self, count: int) -> list[Claim]:
        if self._order.site:
            return await SiteLeases(self._redis, JOB, self._order.site).lease(count)
        return await TicketQueue(self._redis, JOB, lease_ms=3_600_000).claim("actor-0", count, 0)

    async def _flood(self, numbers: Iterator[int]) -> None:
        for first in numbers:
            last = min(first + self._order.batch, self._order.count)
            await self._send(first, [time.monotonic()] * (last - first))

    async def _paced(self, began: float) -> None:
        """Sends what is due, up to a batch at a time; a rollout's time is when it was due."""
        sent, running = 0, set[asyncio.Task[None]]()
        while sent < self._order.count:
            due = min(self._order.count, int((time.monotonic() - began) * self._order.rate), sent + self._order.batch)
            if due > sent and len(running) < SENDERS:
                stamps = [began + number / self._order.rate for number in range(sent, due)]
                task = asyncio.create_task(self._send(sent, stamps))
                running.add(task)
                task.add_done_callback(running.discard)
                sent = due
            await asyncio.sleep(_TICK_S)
        await asyncio.gather(*running)

    async def _send(self, first: int, stamps: list[float]) -> None:
        bodies = [
            _STAMP.pack(stamp) + self._bodies[number % len(self._bodies)] for number, stamp in enumerate(stamps, first)
        ]
        if self._order.ours:
            batch = [(self._claims[number], body, False) for number, body in enumerate(bodies, first)]
            outcomes = await self._rollouts.deliver_many(batch)
            if outcomes != [True] * len(batch):
                raise RuntimeError(f"not delivered: {next(item for item in outcomes if item is not True)!r}")
            return
        pipeline = self._redis.pipeline(transaction=False)
        for body in bodies:
            pipeline.xadd(_BARE, {"payload": body})
        await pipeline.execute()


class Receiver:
    """Takes the rollouts of one run in, and acknowledges each batch."""

    def __init__(self, order: Order, redis: Redis) -> None:
        self._order = order
        self._redis = redis
        self._rollouts = RolloutQueue(redis, JOB)
        self._epoch = 0
        # Of the batch before.
        self._ends: list[End] = []
        self._ids: list[bytes] = []

    async def prepare(self) -> None:
        await self._redis.ping()
        self._epoch = int(await self._redis.get(JobKeys(JOB).epoch) or 0)

    async def run(self) -> list[float]:
        """Returns how long each rollout took from when it was due, in a paced run."""
        began, taken, latencies = time.monotonic(), 0, list[float]()
        take = self._ours if self._order.ours else self._bare
        while taken < self._order.count:
            if time.monotonic() > began + _GIVE_UP_S:
                raise RuntimeError(f"{taken} of {self._order.count} rollouts came")
            bodies = await take()
            now = time.monotonic()
            taken += len(bodies)
            if self._order.rate:
                latencies += [now - _STAMP.unpack_from(body)[0] for body in bodies]
        await self._acknowledge()
        return latencies

    async def _acknowledge(self) -> None:
        if self._order.ours:
            await self._rollouts.acknowledge(self._epoch, self._ends)
        elif self._ids:
            await self._redis.xack(_BARE, "learner", *self._ids)

    async def _ours(self) -> list[bytes]:
        await self._acknowledge()
        found = await self._rollouts.read(self._order.batch, 1000)
        self._ends = [End(item.entry_id, item.ticket_key, "trained") for item in found]
        return [item.payload or b"" for item in found]

    async def _bare(self) -> list[bytes]:
        await self._acknowledge()
        # Any: redis-py types the replies of all protocols at once.
        reply: Any = await self._redis.xreadgroup(
            "learner", "learner", {_BARE: ">"}, count=self._order.batch, block=1000
        )
        found = reply[_BARE.encode()] if reply else []
        self._ids = [entry_id for entry_id, _ in found]
        return [fields[b"payload"] for _, fields in found]


async def work(order: Order) -> None:
    redis = broker.connect(order.url)
    parts: list[Sender | Receiver] = []
    if order.role != "send":
        parts.append(Receiver(order, redis))
    if order.role != "receive":
        parts.append(Sender(order, redis))
    preparing = time.monotonic()
    for part in parts:
        await part.prepare()
    claim_s = time.monotonic() - preparing
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began, used = time.monotonic(), time.process_time()
    latencies = await asyncio.gather(*(part.run() for part in parts))
    done = Done(began, time.monotonic(), time.process_time() - used, claim_s, latencies[0])
    print(json.dumps(asdict(done)), flush=True)
    await redis.aclose()


if __name__ == "__main__":
    asyncio.run(work(Order(**json.loads(sys.argv[1]))))
