"""An actor's view of several scripted generators over real gRPC: what a rollout's reply is drawn through."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from processes import free_port
from scripted_peers import Peers, ScriptedGenerator, ScriptedVerifier, Step

from longshore.actor.addresses import AddressBook
from longshore.actor.balancing import Balancer, Standing
from longshore.actor.clients import GeneratorClient
from longshore.actor.dispatch import Dispatch
from longshore.actor.drawing import Drawer, DrawLimits
from longshore.actor.episode import Reply
from longshore.actor.fleet import Fleet
from longshore.actor.moving import Mover
from longshore.types import JobRef, Sampling, Ticket

JOB = JobRef("default", "j")
WAIT_S = 20.0
Script = Sequence[Step] | Callable[..., Sequence[Step]]


class Generators:
    """`number` scripted generators, listed in a file as an actor reads it."""

    def __init__(self, folder: Path, number: int, timeout_s: float = WAIT_S, patience_s: float = WAIT_S) -> None:
        self.file = folder / "generators.txt"
        self.peers = [Peers(ScriptedGenerator(()), ScriptedVerifier(), free_port()) for _ in range(number)]
        self.balancer = Balancer(time.monotonic)
        self.dispatch = Dispatch(self.balancer, time.monotonic)
        self.mover = Mover(self.balancer, time.monotonic)
        self.fleet = Fleet(JOB, AddressBook([f"file:{self.file}"]), self.dispatch, self.mover, self)
        limits = DrawLimits(timeout_s, patience_s)
        self.client = GeneratorClient(Drawer(self.fleet, self.dispatch, self.mover, limits, self, time.monotonic))
        self.retries = 0
        self.moves: list[str] = []
        self._running: asyncio.Task[None] | None = None

    # -- what is told to metrics

    def retried_generator(self) -> None:
        self.retries += 1

    def moved(self, reason: str, tokens: int) -> None:
        self.moves.append(reason)

    def generators(self, standings: list[Standing], waiting: int) -> None:
        pass

    # -- the world

    def list(self, *numbers: int) -> None:
        lines = [self.peers[number].address for number in numbers]
        self.file.write_text("# generators\n" + "\n".join(lines))

    async def start(self) -> None:
        """All are listed, started and used."""
        for peer in self.peers:
            await peer.start()
        self.list(*range(len(self.peers)))
        self._running = asyncio.create_task(self.fleet.run())
        await self.until_usable(*range(len(self.peers)))

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        for peer in self.peers:
            await peer.stop()

    async def until_usable(self, *numbers: int) -> None:
        """Until these and no others are used."""
        wanted = sorted(self.peers[number].address for number in numbers)
        async with asyncio.timeout(WAIT_S):
            while sorted(self.balancer.usable()) != wanted:
                assert self._running is not None
                assert not self._running.done(), self._running
                await asyncio.sleep(0.01)

    def scripts(self, number: int, *scripts: Script) -> None:
        generator = self.peers[number].generator
        generator.scripts = list(scripts)
        generator.requests.clear()
        generator.asked.clear()
        generator.cancelled.clear()

    async def draw(self, ticket: Ticket, sampling: Sampling | None = None, turn: int = 4) -> Reply:
        async with asyncio.timeout(WAIT_S):
            return await self.client.generate(ticket, 2, [5, 6], sampling or ticket.sampling, turn)
