"""The actor process: claims tickets, plays them against generator, environment and verifier, delivers rollouts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial

import structlog
from redis.asyncio import Redis

from longshore.actor.addresses import AddressBook, parse_entries
from longshore.actor.balancing import Balancer
from longshore.actor.beginning import Beginner, keeps_journal
from longshore.actor.clients import GeneratorClient, VerifierClient
from longshore.actor.config import ActorSettings
from longshore.actor.dispatch import Dispatch
from longshore.actor.drawing import Drawer, DrawLimits
from longshore.actor.fleet import Fleet
from longshore.actor.maker import RolloutMaker
from longshore.actor.metrics import ActorMetrics
from longshore.actor.moving import Mover
from longshore.actor.outbox import Outbox, SpoolPlace
from longshore.actor.runner import Runner, RunnerLimits, until_stopped
from longshore.actor.surroundings import EnvironmentFactory
from longshore.actor.sweeper import Sweeper
from longshore.errors import ConfigError, NotFound, Unavailable
from longshore.rollout_queue import broker
from longshore.rollout_queue.blobs import Blobs
from longshore.rollout_queue.journal import Journal
from longshore.rollout_queue.rollouts import RolloutQueue
from longshore.rollout_queue.spool import Spool
from longshore.rollout_queue.tickets import TicketQueue
from longshore.rpc.channel import channel
from longshore.rpc.process import run_process
from longshore.rpc.server import RpcServer
from longshore.settings import JobFile
from longshore.tasks import registry
from longshore.tasks.environment import SingleTurn
from longshore.tasks.rendering import Renderer
from longshore.weights.client import WeightsClient

HEAD_TIMEOUT_S = 10.0
# One call's own patience with the broker; the runner's is longer, and hears SIGTERM.
_BROKER_CALL_S = 5.0

log = structlog.get_logger()


async def serve(settings: ActorSettings, stop: asyncio.Event) -> None:
    """Runs until `stop`; raises Unavailable when the broker stays away for longer than its patience."""
    job = settings.load_job()
    # What is wrong with it shall be said at once, not when the first version is there.
    entries = parse_entries(settings.generator)
    server = RpcServer(settings.listen)
    await server.start()
    try:
        rendering = await until_stopped(lambda: _rendering(settings, job), stop, "the first policy version")
        if rendering is not None:
            log.info("ready", vocabulary=rendering[0].vocab_size)
            await _run(settings, job, entries, rendering, stop)
    finally:
        await server.drain(settings.drain_s)


async def _rendering(settings: ActorSettings, job: JobFile) -> tuple[Renderer, str]:
    """The tokenizer that came beside the newest weights, and its digest. Raises Unavailable while there are none."""
    client = WeightsClient(settings.weights, job.ref, bytes.fromhex(job.learner_public_key))
    try:
        version = await client.head(HEAD_TIMEOUT_S)
        described = await client.describe(version)
        assets = await client.assets(described.assets_sha256)
    except NotFound as error:
        raise Unavailable(str(error)) from None
    finally:
        await client.close()
    return await asyncio.to_thread(Renderer, assets), described.assets_sha256


async def _run(
    settings: ActorSettings,
    job: JobFile,
    entries: tuple[str, ...],
    rendering: tuple[Renderer, str],
    stop: asyncio.Event,
) -> None:
    counting = ActorMetrics(job.project, job.job, settings.site)
    async with contextlib.AsyncExitStack() as resources:
        redis = broker.connect(settings.broker_url, patience_s=_BROKER_CALL_S)
        resources.push_async_callback(redis.aclose)
        blobs = Blobs.open(settings.blobs_url) if settings.blobs_url else None
        rollouts = RolloutQueue(redis, job.ref, settings.site, blobs=blobs)
        place = await _open_spool(settings)
        if place is not None:
            resources.callback(place.spool.close)
        fleet, drawer = _generators(settings, job, entries, counting)
        maker = await resources.enter_async_context(_maker(settings, job, rendering, redis, drawer, counting))
        runner = Runner(
            settings.name,
            _tickets(settings, job, redis),
            Outbox(rollouts, place, settings.broker_patience_s, counting),
            maker.make,
            _limits(settings, job),
            counting,
        )
        async with asyncio.TaskGroup() as group:
            if place is not None:
                sweeper = Sweeper(job.ref, place.spool, rollouts, partial(broker.incarnation, redis), counting)
                sweeping = group.create_task(sweeper.run(), name="sweep")
            keeping = group.create_task(fleet.run(), name="generators")
            await runner.run(stop)
            keeping.cancel()
            if place is not None:
                sweeping.cancel()


async def _open_spool(settings: ActorSettings) -> SpoolPlace | None:
    """Finds what an earlier life has left. Raises ConfigError when the folder cannot be used."""
    folder = settings.spool_dir
    if folder is None:
        return None
    try:
        spool = await asyncio.to_thread(Spool.open, folder, settings.spool_mb * 1024 * 1024)
    except OSError as error:
        raise ConfigError(f"LONGSHORE_SPOOL_DIR {folder}: {error}") from None
    log.info("spool opened", rollouts=len(spool.keys()), used_bytes=spool.used_bytes)
    return SpoolPlace(spool, folder)


def _tickets(settings: ActorSettings, job: JobFile, redis: Redis) -> TicketQueue:
    resources = job.spec.resources
    lease_ms = int(resources.actor_lease_s * 1000)
    return TicketQueue(redis, job.ref, settings.site, max_attempts=resources.max_attempts, lease_ms=lease_ms)


def _limits(settings: ActorSettings, job: JobFile) -> RunnerLimits:
    places = job.spec.resources_at(settings.site).rollouts_per_actor
    return RunnerLimits(places, job.spec.resources.actor_lease_s, settings.drain_s, settings.broker_patience_s)


@contextlib.asynccontextmanager
async def _maker(
    settings: ActorSettings,
    job: JobFile,
    rendering: tuple[Renderer, str],
    redis: Redis,
    drawer: Drawer,
    counting: ActorMetrics,
) -> AsyncIterator[RolloutMaker]:
    spec, patience_s = job.spec, settings.peer_patience_s
    async with channel(settings.verifier) as to_verifier:
        yield RolloutMaker(
            site=settings.site,
            actor=settings.name,
            environment=spec.environment.name,
            beginner=_beginner(settings, job, rendering, redis, counting),
            generator=GeneratorClient(drawer),
            verifier=VerifierClient(to_verifier, spec.verifier.timeout_s, patience_s, counting.retried_verifier),
            count_tokens=counting.sampled,
        )


def _generators(
    settings: ActorSettings, job: JobFile, entries: tuple[str, ...], counting: ActorMetrics
) -> tuple[Fleet, Drawer]:
    balancer = Balancer(time.monotonic)
    dispatch, mover = Dispatch(balancer, time.monotonic), Mover(balancer, time.monotonic)
    fleet = Fleet(job.ref, AddressBook(entries), dispatch, mover, counting)
    limits = DrawLimits(settings.generate_timeout_s, settings.peer_patience_s)
    return fleet, Drawer(fleet, dispatch, mover, limits, counting, time.monotonic)


def _beginner(
    settings: ActorSettings, job: JobFile, rendering: tuple[Renderer, str], redis: Redis, counting: ActorMetrics
) -> Beginner:
    spec = job.spec
    renderer, digest = rendering
    kind = registry.load(registry.ENVIRONMENTS, spec.environment.name)
    one_turn = spec.environment.max_turns == 1 or kind is SingleTurn
    journal = Journal(redis, job.ref, settings.site) if keeps_journal(one_turn, spec.verifier.timeout_s) else None
    return Beginner(
        store=journal,
        renderer=renderer,
        renderer_digest=digest,
        max_turns=spec.environment.max_turns,
        make_surroundings=EnvironmentFactory(kind, spec.environment.options, settings.environment_timeout_s),
        broker_patience_s=settings.broker_patience_s,
        observer=counting,
    )


def main() -> int:
    """Entry of `longshore serve actor`."""
    return run_process("actor", ActorSettings.from_environment(), serve)
