"""Many generators: how much of their capacity one actor gets, and what the death of one costs.

    python benchmarks/generation_many.py [--quick] [--json FILE]

The actor's own balancing, over real gRPC on loopback, against simulated engines: each decodes 32 replies together, one
token of each a tick, with reply lengths that are lognormal (mean 128 tokens). A tick's length is the engine's speed, so
its capacity is known: 32 tokens a tick. Only the engines' arithmetic is simulated; streams, health, reports, limits and
retries are the real ones. Rollouts come in groups of 8 that share a prefix key, 1.5 times as many at a time as there
are places.

"Of capacity" is tokens drawn in the steady part of a run, divided by the sum of what the engines could have drawn. In
the last run one of three engines dies at a third of the time and is back, proven, at two thirds: "redrawn" are tokens
that were drawn twice, as a share of those that its replies had, which drawing them anew would cost.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from benchmarks import common
from longshore.actor.addresses import AddressBook
from longshore.actor.balancing import Balancer, Standing
from longshore.actor.clients import GeneratorClient
from longshore.actor.dispatch import Dispatch
from longshore.actor.drawing import Drawer, DrawLimits
from longshore.actor.fleet import SERVICE, Fleet
from longshore.actor.moving import Mover
from longshore.proto.v1 import generator_pb2, generator_pb2_grpc, rollout_pb2
from longshore.telemetry.log import configure_logging
from longshore.types import JobRef, Message, Purpose, Sampling, Task, Ticket, TicketRef

SLOTS, GROUP_SIZE, MEAN_TOKENS, SIGMA = 32, 8, 128, 0.8
TICK_S = 0.02
# As the torch engine does.
EVENT_TOKENS, EVENT_S = 32, 0.5
CROWD = 1.5
CAPACITY_GOAL, REDRAWN_GOAL = 0.95, 0.15
JOB = JobRef("default", "many")
ENGINE = rollout_pb2.EngineFingerprint(engine="simulated", engine_version="1", dtype="float32")


@dataclass(eq=False)
class _Running:
    left: int
    # Its stream's: something is to be told.
    ready: asyncio.Event
    # Drawn and not sent, since when, and in all.
    drawn: int = 0
    since: float = 0.0
    total: int = 0
    is_due: bool = False
    is_new: bool = True


class SimulatedGenerator(generator_pb2_grpc.GeneratorServiceServicer):
    """Decodes SLOTS requests together, first come first served."""

    def __init__(self, folder: Path, name: str, tick_s: float, seed: int) -> None:
        self.address = f"unix:{folder}/{name}.sock"
        self.tick_s = tick_s
        self.drawn = 0
        self._random = random.Random(seed)
        self._requests: dict[_Running, None] = {}
        self._server: grpc.aio.Server | None = None
        self._decoding: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server()
        generator_pb2_grpc.add_GeneratorServiceServicer_to_server(self, self._server)
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        await servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self._server.add_insecure_port(self.address)
        await self._server.start()
        self._decoding = asyncio.create_task(self._decode())

    async def die(self) -> None:
        if self._server is not None and self._decoding is not None:
            self._decoding.cancel()
            await self._server.stop(None)
            self._requests.clear()
            self._server = None

    async def _decode(self) -> None:
        due = time.monotonic()
        while True:
            due += self.tick_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            for running in list(self._requests)[:SLOTS]:
                running.since = running.since if running.drawn else due
                running.drawn += 1
                running.total += 1
                running.left -= 1
                self.drawn += 1
                if not running.left:
                    del self._requests[running]
                if running.drawn >= EVENT_TOKENS or due >= running.since + EVENT_S or not running.left:
                    running.is_due = True
                    running.ready.set()

    async def GetStatus(self, request: Any, context: Any) -> generator_pb2.GetStatusResponse:  # noqa: N802
        asked = len(self._requests)
        running = min(asked, SLOTS)
        return generator_pb2.GetStatusResponse(
            policy_version=0,
            running_requests=running,
            waiting_requests=asked - running,
            max_running_requests=SLOTS,
            kv_used_ratio=running / SLOTS,
        )

    async def Generate(self, messages: Any, context: Any) -> AsyncIterator[generator_pb2.GenerateResponse]:  # noqa: N802
        ours: dict[int, _Running] = {}
        ready = asyncio.Event()
        reading = asyncio.create_task(self._read(messages, ours, ready))
        try:
            while True:
                await ready.wait()
                ready.clear()
                events = [_event(call, ours.pop(call) if not ours[call].left else ours[call]) for call in _due(ours)]
                if events:
                    yield generator_pb2.GenerateResponse(events=events)
        finally:
            reading.cancel()
            for running in ours.values():
                self._requests.pop(running, None)

    async def _read(self, messages: Any, ours: dict[int, _Running], ready: asyncio.Event) -> None:
        mu = math.log(MEAN_TOKENS) - SIGMA**2 / 2
        async for message in messages:
            for call in message.cancelled:
                running = ours.pop(call, None)
                if running is not None:
                    self._requests.pop(running, None)
            for request in message.requests:
                # What is left of a reply is as long as a reply: close enough; the engine need not know of the other.
                length = max(1, round(self._random.lognormvariate(mu, SIGMA)))
                running = _Running(min(request.sampling.max_new_tokens, length), ready)
                ours[request.call] = running
                self._requests[running] = None


def _due(ours: dict[int, _Running]) -> list[int]:
    return [call for call, running in ours.items() if running.is_due]


def _event(call: int, running: _Running) -> generator_pb2.ReplyEvent:
    drawn, running.drawn, running.is_due = running.drawn, 0, False
    is_first, running.is_new = running.is_new, False
    return generator_pb2.ReplyEvent(
        call=call,
        token_ids=[7] * drawn,
        logprobs=[-0.5] * drawn,
        kv=rollout_pb2.KV_MARK_RECOMPUTED,
        finish=rollout_pb2.FINISH_REASON_UNSPECIFIED if running.left else rollout_pb2.FINISH_REASON_STOP,
        engine=ENGINE if is_first else None,
    )


class Actor:
    """The actor's part: draws replies for `places` rollouts at a time, group after group."""

    def __init__(self, addresses: list[str], places: int) -> None:
        balancer = Balancer(time.monotonic)
        dispatch, mover = Dispatch(balancer, time.monotonic), Mover(balancer, time.monotonic)
        self._fleet = Fleet(JOB, AddressBook(addresses), dispatch, mover, self)
        limits = DrawLimits(600.0, 600.0)
        self._client = GeneratorClient(Drawer(self._fleet, dispatch, mover, limits, self, time.monotonic))
        self._places = places
        self._next = 0
        self.tokens = 0
        self.retries = 0
        self.moves = 0

    def retried_generator(self) -> None:
        self.retries += 1

    def moved(self, reason: str, tokens: int) -> None:
        self.moves += 1

    def generators(self, standings: list[Standing], waiting: int) -> None: ...

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._fleet.run())
            for _ in range(self._places):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            number, self._next = self._next, self._next + 1
            ref = TicketRef(JOB, number // GROUP_SIZE, number % GROUP_SIZE)
            task = Task("t", (Message("user", "x"),))
            ticket = Ticket(ref, GROUP_SIZE, Purpose.TRAIN, task, Sampling(1.0, 2048), 1, 0.0)
            reply = await self._client.generate(ticket, 1, [5, 6], ticket.sampling, 0)
            self.tokens += len(reply.token_ids)


@dataclass(frozen=True)
class Ran:
    """Of a run's steady part."""

    of_capacity: float
    # Tokens of the engine that died that were drawn twice, of those that its unfinished replies had.
    redrawn: float
    retries: int
    moves: int


async def measure(ticks: list[float], seconds: float, folder: Path, *, death: bool = False) -> Ran:
    engines = [SimulatedGenerator(folder, f"g{index}", tick, index) for index, tick in enumerate(ticks)]
    for engine in engines:
        await engine.start()
    actor = Actor([engine.address for engine in engines], int(CROWD * SLOTS * len(engines)))
    acting = asyncio.create_task(actor.run())
    await asyncio.sleep(seconds / 4)
    capacity = [SLOTS / tick for tick in ticks]
    began, drawn, redrawn, expected = time.monotonic(), sum(engine.drawn for engine in engines), 0.0, 0.0
    if death:
        await asyncio.sleep(seconds / 3)
        broken = list(engines[-1]._requests)
        redrawn = sum(running.drawn for running in broken) / max(1, sum(running.total for running in broken))
        await engines[-1].die()
        away = time.monotonic()
        await asyncio.sleep(seconds / 3)
        await engines[-1].start()
        expected = -capacity[-1] * (time.monotonic() - away)
        await asyncio.sleep(seconds / 3)
    else:
        await asyncio.sleep(seconds)
    done = sum(engine.drawn for engine in engines) - drawn
    expected += sum(capacity) * (time.monotonic() - began)
    acting.cancel()
    await asyncio.gather(acting, return_exceptions=True)
    for engine in engines:
        await engine.die()
    return Ran(done / expected, redrawn, actor.retries, actor.moves)


async def run(report: common.Report, args: argparse.Namespace) -> None:
    configure_logging("benchmark", "benchmark", "error")
    seconds = 6.0 if args.quick else 30.0
    cases = {
        "two equal engines": [TICK_S, TICK_S],
        "two engines, one 5 times slower": [TICK_S, 5 * TICK_S],
        "eight engines": [4 * TICK_S] * 8,
    }
    with tempfile.TemporaryDirectory(prefix="many-") as folder:
        for name, ticks in cases.items():
            report.note(f"{name}, {seconds:g} s")
            ran = await measure(ticks, seconds, Path(folder))
            report.add(
                f"{name}: of capacity",
                ran.of_capacity,
                "x",
                against=f"{sum(SLOTS / tick for tick in ticks):,.0f} tokens/s; {ran.moves} replies moved",
                at_least=CAPACITY_GOAL,
            )
        report.note(f"three engines, one dies, {2 * seconds:g} s")
        ran = await measure([2 * TICK_S] * 3, 2 * seconds, Path(folder), death=True)
        against = f"what was alive; {ran.retries} streams broke"
        report.add("one of three dies: of capacity", ran.of_capacity, "x", against=against, at_least=CAPACITY_GOAL)
        report.add("one of three dies: redrawn", ran.redrawn, "x", against="its replies anew", at_most=REDRAWN_GOAL)


if __name__ == "__main__":
    sys.exit(common.run(__doc__ or "", run))
