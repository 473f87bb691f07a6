"""The actor process: claims tickets, plays them against generator, environment and verifier, delivers rollouts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from longshore.actor import metrics
from longshore.actor.clients import GeneratorClient, VerifierClient
from longshore.actor.config import ActorSettings
from longshore.actor.maker import RolloutMaker
from longshore.actor.runner import Runner, RunnerLimits, until_stopped
from longshore.actor.surroundings import EnvironmentFactory
from longshore.errors import NotFound, Unavailable
from longshore.rollout_queue import broker
from longshore.rollout_queue.rollouts import RolloutQueue
from longshore.rollout_queue.tickets import TicketQueue
from longshore.rpc.channel import channel
from longshore.rpc.process import run_process
from longshore.rpc.server import RpcServer
from longshore.settings import JobFile
from longshore.tasks import registry
from longshore.tasks.rendering import Renderer
from longshore.weights.client import WeightsClient

HEAD_TIMEOUT_S = 10.0
# One call's own patience with the broker; the runner's is longer, and hears SIGTERM.
_BROKER_CALL_S = 5.0

log = structlog.get_logger()


class _Observer:
    """Turns what the runner reports into metrics."""

    def __init__(self, labels: tuple[str, str, str]) -> None:
        self._labels = labels
        self._running = metrics.RUNNING.labels(*labels)
        self._seconds = metrics.SECONDS.labels(*labels)

    def started(self, running: int) -> None:
        self._running.set(running)

    def ended(self, outcome: str, seconds: float, running: int) -> None:
        self._running.set(running)
        self._seconds.observe(seconds)
        metrics.ROLLOUTS.labels(*self._labels, outcome).inc()


async def serve(settings: ActorSettings, stop: asyncio.Event) -> None:
    """Runs until `stop`; raises Unavailable when the broker stays away for longer than its patience."""
    job = settings.load_job()
    server = RpcServer(settings.listen)
    await server.start()
    try:
        renderer = await until_stopped(lambda: _renderer(settings, job), stop, "the first policy version")
        if renderer is not None:
            log.info("ready", vocabulary=renderer.vocab_size)
            await _run(settings, job, renderer, stop)
    finally:
        await server.drain(settings.drain_s)


async def _renderer(settings: ActorSettings, job: JobFile) -> Renderer:
    """The tokenizer that came beside the newest weights. Raises Unavailable while there are none."""
    client = WeightsClient(settings.weights, job.ref, bytes.fromhex(job.learner_public_key))
    try:
        version = await client.head(HEAD_TIMEOUT_S)
        described = await client.describe(version)
        assets = await client.assets(described.assets_sha256)
    except NotFound as error:
        raise Unavailable(str(error)) from None
    finally:
        await client.close()
    return await asyncio.to_thread(Renderer, assets)


async def _run(settings: ActorSettings, job: JobFile, renderer: Renderer, stop: asyncio.Event) -> None:
    spec = job.spec
    lease_s = spec.resources.actor_lease_s
    redis = broker.connect(settings.broker_url, patience_s=_BROKER_CALL_S)
    try:
        tickets = TicketQueue(
            redis,
            job.ref,
            settings.site,
            max_attempts=spec.resources.max_attempts,
            lease_ms=int(lease_s * 1000),
        )
        limits = RunnerLimits(spec.resources.rollouts_per_actor, lease_s, settings.drain_s, settings.broker_patience_s)
        async with _maker(settings, job, renderer) as maker:
            observer = _Observer(_labels(settings, job))
            runner = Runner(
                settings.name, tickets, RolloutQueue(redis, job.ref, settings.site), maker.make, limits, observer
            )
            await runner.run(stop)
    finally:
        await redis.aclose()


@contextlib.asynccontextmanager
async def _maker(settings: ActorSettings, job: JobFile, renderer: Renderer) -> AsyncIterator[RolloutMaker]:
    spec, labels = job.spec, _labels(settings, job)
    kind = registry.load(registry.ENVIRONMENTS, spec.environment.name)
    environments = EnvironmentFactory(kind, spec.environment.options, settings.environment_timeout_s)
    async with channel(settings.generator) as to_generator, channel(settings.verifier) as to_verifier:
        yield RolloutMaker(
            site=settings.site,
            actor=settings.name,
            environment=spec.environment.name,
            max_turns=spec.environment.max_turns,
            renderer=renderer,
            surroundings=environments,
            generator=GeneratorClient(
                to_generator,
                settings.generate_timeout_s,
                settings.peer_patience_s,
                metrics.RETRIES.labels(*labels, "generator").inc,
            ),
            verifier=VerifierClient(
                to_verifier,
                spec.verifier.timeout_s,
                settings.peer_patience_s,
                metrics.RETRIES.labels(*labels, "verifier").inc,
            ),
            count_tokens=metrics.TOKENS.labels(*labels).inc,
        )


def _labels(settings: ActorSettings, job: JobFile) -> tuple[str, str, str]:
    return job.project, job.job, settings.site


def main() -> int:
    """Entry of `longshore serve actor`."""
    return run_process("actor", ActorSettings.from_environment(), serve)
