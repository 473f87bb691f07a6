"""A relay's weights side in this process: its store in a folder, its mirror of a home, and the server for readers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from longshore.proto.v1 import weights_pb2_grpc
from longshore.relay.home_weights import HomeWeights
from longshore.relay.mirror import Mirror
from longshore.relay.site_weights import SiteWeights
from longshore.rpc.server import RpcServer
from longshore.types import JobRef
from longshore.weight_store.copies import Copies as StoreCopies
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import open_objects
from longshore.weight_store.servicer import WeightsServicer
from longshore.weight_store.store import POLICY, WeightStore
from longshore.weights.client import Copies, WeightsClient

WAIT_S = 20.0


class MirroredSite:
    """What `relay/service.py` makes of them, without the tickets' two sides and the upkeep."""

    def __init__(self, folder: Path, job: JobRef, public_key: bytes, home: str, listen: str = "127.0.0.1:0") -> None:
        self.faults = 0
        self.link: list[bool] = []
        self._job = job
        self._public_key = public_key
        self._home = HomeWeights(home, job)
        objects = open_objects(str(folder / "mirror"))
        self.store = WeightStore(objects, copies=StoreCopies(16, 1 << 30), mirror=True)
        self._servicer = WeightsServicer(self.store, str(objects.root), job)
        self._site = SiteWeights(self.store, self._servicer, job, public_key, keep=16)
        self.mirror = Mirror(self._home, self._site, self.link.append, self._fault)
        self._servicer.upstream = self.mirror
        self._server = RpcServer(listen)
        weights_pb2_grpc.add_WeightsServiceServicer_to_server(self._servicer, self._server.server)
        self._stop = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._clients: list[WeightsClient] = []

    async def start(self) -> MirroredSite:
        await self._server.start()
        self._running = asyncio.create_task(self.mirror.run(self._stop))
        return self

    @property
    def address(self) -> str:
        return self._server.address

    def reader(self, *, copies: bool = True) -> WeightsClient:
        held = Copies[int](3, 1 << 30) if copies else None
        self._clients.append(WeightsClient(self.address, self._job, self._public_key, held))
        return self._clients[-1]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                assert self._running is not None
                if self._running.done():
                    self._running.result()
                await asyncio.sleep(0.005)

    def manifest(self, version: int) -> bytes:
        """As the site's store has it. Raises NotFound."""
        return self.store.version(self._job, VersionKey(POLICY, version))[0].manifest

    def versions(self) -> list[int]:
        return self.store.versions(self._job, POLICY, None, 1000)

    async def until_head(self, version: int) -> None:
        def there() -> bool:
            state = self.store.pointer(self._job, "head")
            return state is not None and state[0].version == version

        await self.until(there)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        self._stop.set()
        if self._running is not None:
            await asyncio.wait_for(self._running, WAIT_S)
        self._servicer.close()
        await self._server.drain(0)
        await self._home.close()

    def _fault(self) -> None:
        self.faults += 1
