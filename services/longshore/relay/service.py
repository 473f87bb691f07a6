"""The relay process: one for each rollout site and job, and the site's only way to the home broker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from longshore.config import HOME_SITE
from longshore.errors import ConfigError
from longshore.proto.v1 import weights_pb2_grpc
from longshore.relay import metrics
from longshore.relay.book import Book
from longshore.relay.brokers import HomeQueues, SiteQueues
from longshore.relay.config import RelaySettings
from longshore.relay.credential import HomeAccess
from longshore.relay.home_side import RENEW_S, HomeSide
from longshore.relay.home_weights import HomeWeights
from longshore.relay.mirror import Mirror
from longshore.relay.site_side import SiteSide
from longshore.relay.site_weights import SiteWeights
from longshore.rollout_queue import broker
from longshore.rollout_queue.blobs import Blobs
from longshore.rollout_queue.spool import Spool
from longshore.rpc.process import run_process, wait_or_stop
from longshore.rpc.server import RpcServer
from longshore.settings import JobFile
from longshore.weight_store.background import keep_up
from longshore.weight_store.copies import Copies
from longshore.weight_store.objects import open_objects
from longshore.weight_store.servicer import SERVICE, WeightsServicer
from longshore.weight_store.store import COPIES, WeightStore
from longshore.weight_store.upkeep import Upkeep

# One call's own patience with the site's broker; the two sides' is endless.
_CALL_S = 5.0
_REPORT_S = 1.0
# Newest policy versions that a site keeps, besides those that a pointer names.
KEPT_VERSIONS = 16

log = structlog.get_logger()


async def serve(settings: RelaySettings, stop: asyncio.Event) -> None:
    """Runs until `stop`. Becomes healthy once the site's broker is set up, even while home is away."""
    home = await asyncio.to_thread(HomeAccess, settings)
    if home.site == HOME_SITE:
        raise ConfigError("LONGSHORE_SITE: the home site needs no relay")
    # The credential's own word is what counts.
    settings = settings.model_copy(update={"site": home.site})
    job = settings.load_job()
    resources = job.spec.resources
    async with contextlib.AsyncExitStack() as opened:
        spool = await asyncio.to_thread(Spool.open, settings.spool_dir, settings.spool_mb * 1024 * 1024)
        opened.callback(spool.close)
        site_client = broker.connect(settings.broker_url, patience_s=_CALL_S)
        opened.push_async_callback(site_client.aclose)
        # It repeats nothing by itself: a lost reply may have given us tickets, and only who hears of it asks for them.
        home_client = broker.connect(
            home.now.broker_url,
            patience_s=0.0,
            login=home.login if home.now.login is not None else None,
            authority=home.now.authority,
        )
        opened.push_async_callback(home_client.aclose)
        book = Book(spool)
        labels = (job.project, job.job, settings.site)
        site_side = SiteSide(
            SiteQueues(site_client, job.ref, settings.site, _blobs(settings.blobs_url)),
            book,
            metrics.TAKEN_IN.labels(*labels).inc,
            metrics.LOST.labels(*labels).inc,
        )
        home_side = HomeSide(
            HomeQueues(
                home_client,
                job.ref,
                settings.site,
                max_attempts=resources.max_attempts,
                lease_ms=int(resources.site_lease_s * 1000),
                blobs=_blobs(settings.home_blobs_url),
            ),
            book,
            settings.allowance,
            min(RENEW_S, resources.site_lease_s / 10),
            job.spec.train.group_size,
            lambda outcome: metrics.FORWARDED.labels(*labels, outcome).inc(),
            metrics.LEASED.labels(*labels).inc,
        )
        home_weights = HomeWeights(home.now.weights, job.ref, home.now.tls)
        opened.push_async_callback(home_weights.close)
        weights = _weights(settings, job, home_weights)
        renewing = home.follow(
            stop, lambda: home_weights.reconnect(home.now.tls), metrics.CREDENTIAL_EXPIRES.labels(*labels).set
        )
        await _run(settings, job, book, site_side, home_side, weights, renewing, stop)


@dataclass(frozen=True)
class _Weights:
    """The site's weight store: what serves it, what fills it, and what makes its encodings."""

    servicer: WeightsServicer
    mirror: Mirror
    upkeep: Upkeep


def _weights(settings: RelaySettings, job: JobFile, home: HomeWeights) -> _Weights:
    objects = open_objects(str(settings.weights_dir))
    store = WeightStore(objects, copies=Copies(COPIES, settings.host_copies_mb * 1024 * 1024), mirror=True)
    upkeep = Upkeep(store)
    store.when_published(upkeep.wake)
    servicer = WeightsServicer(store, str(objects.root) if objects.root else None, job.ref)
    labels = (job.project, job.job, settings.site)
    site = SiteWeights(store, servicer, job.ref, bytes.fromhex(job.learner_public_key), KEPT_VERSIONS)
    mirror = Mirror(home, site, metrics.WEIGHTS_LINK_UP.labels(*labels).set, metrics.WEIGHTS_FAULTS.labels(*labels).inc)
    servicer.upstream = mirror
    return _Weights(servicer, mirror, upkeep)


async def _run(
    settings: RelaySettings,
    job: JobFile,
    book: Book,
    site_side: SiteSide,
    home_side: HomeSide,
    weights: _Weights,
    renewing: Coroutine[Any, Any, None],
    stop: asyncio.Event,
) -> None:
    server = RpcServer(settings.listen)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(weights.servicer, server.server)
    labels = (job.project, job.job, settings.site)
    async with asyncio.TaskGroup() as group:
        group.create_task(site_side.run(stop), name="site")
        group.create_task(home_side.run(stop), name="home")
        group.create_task(weights.mirror.run(stop), name="weights")
        group.create_task(keep_up(weights.upkeep, stop), name="upkeep")
        group.create_task(renewing, name="credential")
        group.create_task(_report(book, labels, stop), name="report")
        group.create_task(_serve_when_prepared(server, site_side, stop), name="health")
    weights.servicer.close()
    await server.drain(settings.drain_s)
    log.info("stopped", held=len(book.held), spooled=len(book.spool.keys()))


async def _serve_when_prepared(server: RpcServer, site_side: SiteSide, stop: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in (site_side.prepared, stop)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    if site_side.prepared.is_set():
        await server.start()
        await server.set_serving(SERVICE, True)


async def _report(book: Book, labels: tuple[str, str, str], stop: asyncio.Event) -> None:
    """Keeps the gauges."""
    while True:
        for gauge, value in (
            (metrics.HELD, len(book.held)),
            (metrics.AT_SITE, len(book.at_site)),
            (metrics.SPOOL_RECORDS, len(book.spool.keys())),
            (metrics.SPOOL_BYTES, book.spool.used_bytes),
            (metrics.SPOOL_FULL, book.spool_full),
            (metrics.OLDEST, book.oldest_s),
            (metrics.LINK_UP, book.home_known),
            (metrics.SITE_UP, book.site_known),
        ):
            gauge.labels(*labels).set(value)
        if await wait_or_stop(stop, _REPORT_S):
            return


def _blobs(url: str) -> Blobs | None:
    return Blobs.open(url) if url else None


def main() -> int:
    """Entry of `longshore serve relay`."""
    return run_process("relay", RelaySettings.from_environment(), serve)
