"""A weight store in this process, as `weights/service.py` puts it together, with a few versions of a job."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

from longshore.proto.v1 import weights_pb2_grpc
from longshore.rpc.server import RpcServer
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.weight_store.copies import Copies
from longshore.weight_store.objects import open_objects
from longshore.weight_store.payload import Tensor
from longshore.weight_store.servicer import WeightsServicer
from longshore.weight_store.store import WeightStore
from longshore.weights.client import VersionDraft, WeightsClient

ASSETS = {"config.json": json.dumps({"hidden_size": 8}).encode(), "tokenizer.json": b"{}"}


@contextlib.asynccontextmanager
async def weight_origin(folder: Path) -> AsyncIterator[str]:
    """Serves a store in a folder; yields its address."""
    objects = open_objects(str(folder))
    servicer = WeightsServicer(WeightStore(objects, copies=Copies(4, 1 << 30)), str(objects.root))
    server = RpcServer("127.0.0.1:0")
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(servicer, server.server)
    await server.start()
    yield server.address
    servicer.close()
    await server.drain(0.5)


def tensors_of(version: int) -> list[Tensor]:
    """Those that `publish_versions` gives a version."""
    return [Tensor("w", "bfloat16", (4, 8), bytes([version]) * 64)]


async def publish_versions(address: str, job: JobFile, key: SigningKey, count: int, keep: int = 3) -> None:
    """Publishes versions 0 to count - 1, each in full: so none is kept for another's sake."""
    for version in range(count):
        client = WeightsClient(address, job.ref, key.public_key)
        try:
            await client.register_key(keep)
            draft = VersionDraft(version, version * 10, 1, version - 1 if version else None, (), 1_700_000_000.0)
            await client.publish(key, draft, tensors_of(version), ASSETS)
        finally:
            await client.close()
