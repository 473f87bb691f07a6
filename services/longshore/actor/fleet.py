"""An actor's generators over gRPC: who there is, who serves, what each reports, and the replies that are drawn.

| loop          | waits for                                                       | at its deadline        |
|---------------|-----------------------------------------------------------------|------------------------|
| `_membership` | 5 s, then the names to be looked up                             | the last answer stands |
| `_health`     | a generator's `grpc.health.v1` Watch: a change, 60 s at a time  | watches again          |
| `_reports`    | 1 s, then GetStatus, for 3 s                                    | counted as a silence   |

A generator is used while its health for the service is SERVING (it holds a proven version) and it answers for our job.
After `_SILENCES` reports in a row that did not come it is not used, and what it was drawing goes on elsewhere.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from longshore.actor.addresses import Address, AddressBook
from longshore.actor.asking import AskFailed, Asking
from longshore.actor.balancing import Standing, Trouble
from longshore.actor.dispatch import Dispatch
from longshore.actor.drawing import Ask, TryFailed, Wanted
from longshore.actor.limit import Report
from longshore.actor.moving import Mover
from longshore.errors import ConfigError
from longshore.proto.v1 import generator_pb2, generator_pb2_grpc, job_pb2
from longshore.rpc import convert
from longshore.rpc.channel import channel
from longshore.types import JobRef

SERVICE = "longshore.proto.v1.GeneratorService"
_Code = grpc.StatusCode

_MEMBERSHIP_S = 5.0
_WATCH_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 2.0
_REPORT_S = 1.0
_REPORT_TIMEOUT_S = 3.0
_SILENCES = 5
_LOOK_S = 0.5

log = structlog.get_logger()


class FleetObserver(Protocol):
    """Told how the generators stand, for metrics."""

    def generators(self, standings: list[Standing], waiting: int) -> None: ...


class _Peer:
    """One generator's connection."""

    def __init__(self, address: Address, job: job_pb2.JobRef) -> None:
        self.address = address
        # Its failures are answered by going elsewhere, not by waiting for it: the channel repeats nothing.
        self.channel = channel(address.target, name=address.name, retries=False)
        self.asking = Asking(self.channel, job)
        self.generator = generator_pb2_grpc.GeneratorServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        # Replies that are being drawn.
        self.replies = 0
        self.tasks: list[asyncio.Task[None]] = []
        # What health says.
        self.serving = False
        self.silences = 0
        # Whether it was logged that it is another job's.
        self.foreign = False

    async def close(self) -> None:
        await self.asking.close()
        await self.channel.close()


class Fleet:
    """The generators that an address book names. `run` keeps it; streams may be drawn meanwhile."""

    def __init__(
        self, job: JobRef, book: AddressBook, dispatch: Dispatch, mover: Mover, observer: FleetObserver
    ) -> None:
        self._job = convert.job_to_proto(job)
        self._book = book
        self._dispatch = dispatch
        self._balancer = dispatch.balancer
        self._mover = mover
        self._observer = observer
        self._peers: dict[str, _Peer] = {}
        # What was last said of a generator that cannot be talked to.
        self._unfit = ""

    async def run(self) -> None:
        """Until cancelled. Raises ConfigError when none of the generators can be talked to from here."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._look(), name="generators-look")
                while True:
                    await self._membership(group)
                    await asyncio.sleep(_MEMBERSHIP_S)
        finally:
            for peer in self._peers.values():
                await peer.close()

    async def stream(
        self, generator: str, wanted: Wanted, ask: Ask, timeout_s: float
    ) -> AsyncGenerator[generator_pb2.ReplyEvent]:
        """See drawing.Source."""
        peer = self._peers.get(generator)
        if peer is None:
            raise TryFailed(Trouble.AWAY, f"{generator} has left")
        request = generator_pb2.ReplyRequest(
            request_id=ask.request_id,
            token_ids=ask.token_ids,
            sampling=convert.sampling_to_proto(ask.sampling),
            version=convert.version_to_proto(wanted.version),
            prefix_key=wanted.prefixes[-1],
        )
        peer.replies += 1
        try:
            async with aclosing(peer.asking.reply(request, timeout_s)) as events:
                async for event in events:
                    yield event
        except AskFailed as error:
            raise _failure(generator, error) from None
        finally:
            peer.replies -= 1

    async def _membership(self, group: asyncio.TaskGroup) -> None:
        found = {address.target: address for address in await self._book.read()}
        for target, address in found.items():
            if target not in self._peers and not self._join(address, group):
                continue
            if self._balancer.join(target):
                # Perhaps not a new one, but one that had not left altogether.
                self._balancer.serves(target, self._peers[target].serving)
        if found and not self._peers:
            # Then it is the settings that are wrong.
            raise ConfigError(self._unfit)
        for target in [target for target in self._peers if target not in found]:
            await self._leave(target)
        self._dispatch.wake()

    def _join(self, address: Address, group: asyncio.TaskGroup) -> bool:
        """Whether it can be talked to from here."""
        target = address.target
        try:
            peer = _Peer(address, self._job)
        except ConfigError as error:
            if self._unfit != str(error):
                log.warning("generator cannot be used", generator=target, reason=str(error))
            self._unfit = str(error)
            return False
        log.info("generator joins", generator=target, name=address.name)
        self._peers[target] = peer
        loops = (self._health(peer), self._reports(peer))
        peer.tasks = [group.create_task(loop, name=f"generator-{target}") for loop in loops]
        return True

    async def _leave(self, target: str) -> None:
        """It gets no more requests; what it draws may finish, and then its connection is closed."""
        peer = self._peers[target]
        self._balancer.leave(target)
        if peer.replies:
            return
        log.info("generator leaves", generator=target)
        del self._peers[target]
        self._mover.forget(target)
        for task in peer.tasks:
            task.cancel()
        await peer.close()

    async def _health(self, peer: _Peer) -> None:
        pause = _FIRST_PAUSE_S
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        while True:
            serving = False
            try:
                async for answer in peer.health.Watch(request, timeout=_WATCH_S):
                    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
                    pause = _FIRST_PAUSE_S
                    await self._serves(peer, serving)
            except grpc.aio.AioRpcError as error:
                if error.code() is _Code.DEADLINE_EXCEEDED and serving:
                    continue
            await self._serves(peer, False)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _serves(self, peer: _Peer, serving: bool) -> None:
        if serving != peer.serving:
            log.info("generator", generator=peer.address.target, serving=serving)
        peer.serving = serving
        self._balancer.serves(peer.address.target, serving)
        if serving:
            # Nothing is sent to it before it has reported.
            await self._report(peer)
        self._dispatch.wake()

    async def _reports(self, peer: _Peer) -> None:
        while True:
            await asyncio.sleep(_REPORT_S * random.uniform(0.75, 1.25))  # noqa: S311 - spread
            if peer.serving:
                await self._report(peer)

    async def _report(self, peer: _Peer) -> None:
        target = peer.address.target
        try:
            status = await peer.generator.GetStatus(
                generator_pb2.GetStatusRequest(job=self._job), timeout=_REPORT_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            self._has_not_reported(peer, error)
            return
        peer.silences, peer.foreign = 0, False
        if peer.serving and status.HasField("policy_version"):
            self._balancer.serves(target, True)
            self._balancer.reported(
                target,
                Report(
                    status.running_requests,
                    status.waiting_requests,
                    status.max_running_requests,
                    status.kv_used_ratio,
                    tuple(status.resident_versions) or (status.policy_version,),
                ),
            )
            self._dispatch.wake()

    def _has_not_reported(self, peer: _Peer, error: grpc.aio.AioRpcError) -> None:
        target = peer.address.target
        if error.code() is _Code.INVALID_ARGUMENT:
            # An address that has been given to another job's generator since: without a report it is not used.
            if not peer.foreign:
                log.warning("not our generator", generator=target, reason=error.details())
            peer.foreign = True
            return
        peer.silences += 1
        if peer.silences == _SILENCES:
            log.warning("generator does not answer", generator=target, reason=error.code().name)
            self._balancer.serves(target, False)
            self._mover.silent(target)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            self._mover.look()
            self._observer.generators(self._balancer.standings(), self._dispatch.num_waiting)


def _failure(generator: str, error: AskFailed) -> TryFailed:
    code, text = error.code, f"{generator}: {error}"
    # What ends a stream with many requests speaks against none of them.
    if error.broke:
        return TryFailed(Trouble.AWAY, text)
    if code in (_Code.INTERNAL, _Code.UNKNOWN):
        return TryFailed(Trouble.FAULT, text)
    if code in (_Code.INVALID_ARGUMENT, _Code.OUT_OF_RANGE):
        return TryFailed(Trouble.REQUEST, error.details or "the generator refuses the prompt", refused="prompt")
    if code is _Code.FAILED_PRECONDITION:
        return TryFailed(Trouble.REQUEST, error.details or "the policy version is gone", refused="version")
    if code is _Code.RESOURCE_EXHAUSTED:
        return TryFailed(Trouble.FULL, text)
    # What is pinned to a version may find no room, or the version may not have come: others are served all the same.
    if code in (_Code.DEADLINE_EXCEEDED, _Code.ABORTED, _Code.NOT_FOUND):
        return TryFailed(Trouble.REQUEST, text)
    return TryFailed(Trouble.AWAY, text)
