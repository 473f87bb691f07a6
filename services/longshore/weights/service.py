"""The weight store's process: the origin of every job's versions."""

from __future__ import annotations

import asyncio

from longshore.proto.v1 import weights_pb2_grpc
from longshore.rpc.process import run_process
from longshore.rpc.server import RpcServer
from longshore.sites.book import SiteBook
from longshore.weight_store.background import keep_up
from longshore.weight_store.copies import Copies
from longshore.weight_store.objects import open_objects
from longshore.weight_store.servicer import SERVICE, SITE_METHODS, WeightsServicer
from longshore.weight_store.store import COPIES, WeightStore
from longshore.weight_store.upkeep import Upkeep
from longshore.weights.config import WeightsSettings


async def serve(settings: WeightsSettings, stop: asyncio.Event) -> None:
    """Serves until `stop` is set, then drains. Raises ConfigError."""
    objects = open_objects(settings.store_url)
    store = WeightStore(objects, copies=Copies(COPIES, settings.host_copies_mb * 1024 * 1024))
    upkeep = Upkeep(store)
    store.when_published(upkeep.wake)
    servicer = WeightsServicer(store, str(objects.root) if objects.root else None)
    async with asyncio.TaskGroup() as group:
        group.create_task(_serve(settings, servicer, stop), name="serve")
        group.create_task(keep_up(upkeep, stop), name="upkeep")


async def _serve(settings: WeightsSettings, servicer: WeightsServicer, stop: asyncio.Event) -> None:
    sites = SiteBook(settings.sites_file) if settings.sites_file is not None else None
    server = RpcServer(settings.listen, sites=sites, site_methods=SITE_METHODS)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(servicer, server.server)
    await server.start()
    await server.set_serving(SERVICE, True)
    await stop.wait()
    servicer.close()
    await server.drain(settings.drain_s)


def main() -> int:
    return run_process("weights", WeightsSettings.from_environment(), serve)
