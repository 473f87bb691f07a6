"""Egress: what crosses the link between a rollout site and home, for each token, both ways and everything counted.

    python benchmarks/egress.py [--quick] [--json FILE]

A site with a broker, a spool and the real relay process's code works for a home broker behind a counting proxy; actors
and learner are simulated on the real queue, at a real engine's pace (40 tokens a second), because leases are renewed by
the clock. Token ids are drawn from a vocabulary of 151,936 by Zipf's law, log-probs as a model's at temperature 1: most
of them near 0, a long tail. Nothing is taken away from what is sent: tickets, leases, questions, keys, TCP excepted.

- single-turn: 8 rollouts of a task; a prompt of some 120 tokens, some 400 sampled.
- tools: four turns of some 120 sampled tokens, each followed by some 200 tokens that the environment gives.

A token that only travels as text of a task (the prompt's) counts as given once for each rollout that carries it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from redis.asyncio import Redis

from benchmarks import common
from benchmarks.common_broker import PrivateBroker
from longshore.relay.book import Book
from longshore.relay.brokers import HomeQueues, SiteQueues
from longshore.relay.home_side import HomeSide
from longshore.relay.site_side import SiteSide
from longshore.rollout_queue import broker
from longshore.rollout_queue.rollouts import End, RolloutQueue
from longshore.rollout_queue.spool import Spool
from longshore.rollout_queue.tickets import Claim, TicketQueue
from longshore.rpc.convert_rollout import rollout_from_bytes, rollout_to_bytes
from longshore.rpc.token_columns import prompt_digest
from longshore.telemetry.log import configure_logging
from longshore.types import (
    EngineFingerprint,
    FinishReason,
    GivenSpan,
    JobRef,
    Message,
    Purpose,
    Rollout,
    SampledSpan,
    Sampling,
    Segment,
    Span,
    Task,
    Ticket,
    TicketRef,
    Turn,
    Verdict,
)

SAMPLED_GOAL, GIVEN_GOAL = 5.0, 2.5
SITE = "west"
SLOTS, GROUP_SIZE, ALLOWANCE = 64, 8, 96
TOKENS_PER_S = 40.0
VOCABULARY = 151_936
# Every so often the simulated learner makes what it has durable, and acknowledges it.
CHECKPOINT_S = 10.0
_SAMPLING = Sampling(1.0, 4096, (151_645,))
_ENGINE = EngineFingerprint("vllm", "0.24.0", "bfloat16", "1f0c83ab")
_CHUNK = 64 * 1024


@dataclass(frozen=True)
class Shape:
    """Mean lengths in tokens; a rollout has `turns` sampled spans, with given ones between them."""

    name: str
    prompt: int
    sampled: int
    given: int
    turns: int


SHAPES = (Shape("single-turn", 120, 400, 0, 1), Shape("tools", 120, 120, 200, 4))


class Texts:
    """Draws tokens and log-probs; the seed decides all of them."""

    def __init__(self, seed: int) -> None:
        self._source = random.Random(seed)
        # A tokenizer's ids are about in the order of how common they are.
        self._ids = list(range(VOCABULARY))
        self._weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(VOCABULARY)))

    def length(self, mean: int) -> int:
        return max(1, round(self._source.lognormvariate(0, 0.5) * mean / 1.13))

    def ids(self, count: int) -> tuple[int, ...]:
        return tuple(self._source.choices(self._ids, cum_weights=self._weights, k=count))

    def logprobs(self, count: int) -> tuple[float, ...]:
        return tuple(
            -(10 ** self._source.uniform(-6, -0.5)) if self._source.random() < 0.7 else -self._source.expovariate(0.7)
            for _ in range(count)
        )

    def words(self, tokens: int) -> str:
        """Text of about so many tokens: four letters and a space each."""
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        return " ".join("".join(self._source.choices(letters[:16], k=4)) for _ in range(tokens))

    def uniform(self, low: float, high: float) -> float:
        return self._source.uniform(low, high)


@dataclass
class Link:
    """Carries TCP connections to `to`, and counts."""

    to_host: str
    to_port: int
    up: int = 0
    down: int = 0
    port: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(self.to_host, self.to_port)
        await asyncio.gather(self._copy(reader, other_writer, True), self._copy(other_reader, writer, False))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                if up:
                    self.up += len(data)
                else:
                    self.down += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()


@dataclass
class Bench:
    """One shape's run: its site's actors and its learner."""

    shape: Shape
    home: Redis
    site: Redis
    job: JobRef
    texts: Texts
    prompts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    sampled: int = 0
    given: int = 0
    prompt_tokens: int = 0
    rollouts: int = 0
    issuing: bool = True

    async def learner(self) -> None:
        """Issues what is wanted, takes in, checks and acknowledges, until all that was issued has come."""
        tickets, queue = TicketQueue(self.home, self.job), RolloutQueue(self.home, self.job)
        await tickets.setup()
        epoch = await tickets.open_epoch()
        await queue.reconcile(epoch, await broker.incarnation(self.home), None)
        issued, ends, saved = 0, list[End](), time.monotonic()
        while self.issuing or self.rollouts < issued:
            if self.issuing and issued - self.rollouts < 2 * ALLOWANCE:
                await tickets.issue(epoch, self._group(issued // GROUP_SIZE))
                issued += GROUP_SIZE
            for item in await queue.read(64, 50):
                group = int(item.ticket_key.partition(".")[0])
                rollout = rollout_from_bytes(item.payload or b"", functools.partial(self.prompts.__getitem__, group))
                self._count(rollout)
                ends.append(End(item.entry_id, item.ticket_key, "trained"))
            if time.monotonic() - saved > CHECKPOINT_S:
                await queue.acknowledge(epoch, ends)
                ends, saved = [], time.monotonic()
        await queue.acknowledge(epoch, ends)

    def _count(self, rollout: Rollout) -> None:
        self.rollouts += 1
        self.sampled += rollout.num_sampled
        spans = rollout.segments[0].spans
        self.prompt_tokens += spans[0].length
        self.given += sum(span.length for span in spans[1:] if isinstance(span, GivenSpan))

    def _group(self, group: int) -> list[Ticket]:
        count = self.texts.length(self.shape.prompt)
        self.prompts[group] = self.texts.ids(count)
        task = Task(f"task-{group}", (Message("user", self.texts.words(count)),), answer="42")
        digest, now = prompt_digest(self.prompts[group]), time.time()
        return [
            Ticket(TicketRef(self.job, group, index), GROUP_SIZE, Purpose.TRAIN, task, _SAMPLING, 1, now, None, digest)
            for index in range(GROUP_SIZE)
        ]

    async def actors(self) -> None:
        """Claims and finishes tickets at the site, SLOTS at a time, each for as long as its tokens take."""
        tickets, running = TicketQueue(self.site, self.job, SITE, lease_ms=600_000), set[asyncio.Task[None]]()
        queue = RolloutQueue(self.site, self.job, SITE)
        while True:
            running = {task for task in running if not task.done() or task.result()}
            free = SLOTS - len(running)
            for claim in await tickets.claim("actor-0", free, 200) if free else []:
                running.add(asyncio.create_task(self._attempt(queue, claim)))
            await asyncio.sleep(0.05)

    async def _attempt(self, queue: RolloutQueue, claim: Claim) -> None:
        rollout = self._rollout(claim)
        # Not all of a wave at once.
        await asyncio.sleep(rollout.num_sampled / TOKENS_PER_S * self.texts.uniform(0.8, 1.2))
        await queue.deliver(claim, rollout_to_bytes(rollout, claim.ticket.prompt_digest))

    def _rollout(self, claim: Claim) -> Rollout:
        shape, texts, ref = self.shape, self.texts, claim.ticket.ref
        ids, spans, turns = list(self.prompts[ref.group_id]), list[Span](), list[Turn]()
        spans.append(GivenSpan(len(ids)))
        for turn in range(shape.turns):
            if turn:
                spans.append(GivenSpan(texts.length(shape.given)))
                ids += texts.ids(spans[-1].length)
            count = texts.length(shape.sampled)
            turns.append(Turn("0", len(ids), count, FinishReason.STOP))
            spans.append(SampledSpan(7 + turn, texts.logprobs(count)))
            ids += texts.ids(count)
        now = time.time()
        return Rollout(
            ref, claim.attempt, Purpose.TRAIN, claim.ticket.task.task_id, (Segment("0", tuple(ids), tuple(spans)),),
            tuple(turns), (_SAMPLING,), (_ENGINE,), FinishReason.STOP, now, now, SITE, "west-actor-0",
            (Verdict(1.0, "exact-match@1"),),
        )  # fmt: skip


async def measure(report: common.Report, args: argparse.Namespace) -> None:
    configure_logging("relay", "benchmark", "error")
    for shape in SHAPES:
        seconds = 20.0 if args.quick else 120.0
        report.note(f"{shape.name}: {seconds:.0f} s of new tickets, and what it takes to finish them")
        await _measure(report, shape, seconds)


async def _measure(report: common.Report, shape: Shape, seconds: float) -> None:
    job = JobRef("default", "egress")
    with PrivateBroker("127.0.0.1") as home, PrivateBroker() as site, tempfile.TemporaryDirectory() as folder:
        link = Link("127.0.0.1", home.port)
        async with link.running(), contextlib.AsyncExitStack() as resources:
            clients = [broker.connect(url) for url in (home.url, site.url, f"redis://127.0.0.1:{link.port}/0")]
            for client in clients:
                resources.push_async_callback(client.aclose)
            bench = Bench(shape, clients[0], clients[1], job, Texts(1))
            await _run(bench, clients[2], Path(folder), seconds)
    _judge(report, bench, link)


async def _run(bench: Bench, away: Redis, folder: Path, seconds: float) -> None:
    spool = Spool.open(folder / "spool", 1 << 30)
    book, stop = Book(spool), asyncio.Event()
    site_side = SiteSide(SiteQueues(bench.site, bench.job, SITE, None), book)
    queues = HomeQueues(away, bench.job, SITE, max_attempts=5, lease_ms=4 * 3_600_000, blobs=None)
    home_side = HomeSide(queues, book, ALLOWANCE, group_size=GROUP_SIZE)
    try:
        learner = asyncio.create_task(bench.learner())
        await asyncio.sleep(0.5)
        relay = [asyncio.create_task(side.run(stop)) for side in (site_side, home_side)]
        await site_side.prepared.wait()
        actors = asyncio.create_task(bench.actors())
        await asyncio.sleep(seconds)
        bench.issuing = False
        async with asyncio.timeout(seconds + 300):
            await learner
        stop.set()
        await asyncio.gather(*relay)
        actors.cancel()
        await asyncio.gather(actors, return_exceptions=True)
    finally:
        spool.close()


def _judge(report: common.Report, bench: Bench, link: Link) -> None:
    given = bench.given + bench.prompt_tokens
    worth = bench.sampled + given * GIVEN_GOAL / SAMPLED_GOAL
    what = f"{bench.rollouts:,} rollouts, {bench.sampled:,} sampled, {given:,} given tokens"
    report.add(
        f"{bench.shape.name}: bytes both ways, a sampled token (a given one counts half)",
        (link.up + link.down) / worth,
        "B",
        against=what,
        at_most=SAMPLED_GOAL,
    )
    report.add(f"{bench.shape.name}: from the site, a rollout", link.up / bench.rollouts, "B")
    report.add(
        f"{bench.shape.name}: to the site, a rollout", link.down / bench.rollouts, "B", against="tickets, answers"
    )


if __name__ == "__main__":
    sys.exit(common.run(__doc__, measure))
