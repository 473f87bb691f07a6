"""Two learners, two keys, and paths, over real gRPC."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from weight_parcels import delta_parcel, full_parcel, history

from longshore.errors import Conflict, Fenced, LongshoreError
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.rpc import convert
from longshore.rpc.channel import channel
from longshore.signing import SigningKey
from longshore.weight_store.decoding import CODECS, SAFETENSORS
from longshore.weight_store.keychain import sign_rotation, verify_chain
from longshore.weight_store.version import sign_pointer

TENSORS = history(6)


async def call(weights, method: str, request: Any) -> Any:
    async with channel(weights.address) as opened:
        return await getattr(weights_pb2_grpc.WeightsServiceStub(opened), method)(request, timeout=20)


async def refused(weights, method: str, request: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await call(weights, method, request)
    return info.value.code()


async def send(weights, parcel) -> weights_pb2.PublishResponse:
    async with channel(weights.address) as opened:
        return await weights_pb2_grpc.WeightsServiceStub(opened).Publish(parcel.messages(), timeout=20)


async def test_of_two_learners_of_one_epoch_one_gets_a_number_and_the_other_is_told(weights) -> None:
    """Same epoch, different weights: neither is silently replaced, and both see the same version."""
    for version in range(4):
        first, second = weights.client(), weights.client()

        async def publish(client, seed: int, version: int = version) -> bool:
            return await client.publish(weights.key, weights.draft(version), weights.tensors(seed), weights.assets)

        results = await asyncio.gather(
            publish(first, 100 + version), publish(second, 200 + version), return_exceptions=True
        )
        failed = [result for result in results if isinstance(result, LongshoreError)]
        assert len(failed) == 1, results
        assert isinstance(failed[0], Conflict)
        seed = (200 if results[0] is failed[0] else 100) + version
        assert (await weights.client().fetch(version)).tensors == tuple(weights.tensors(seed))
        assert await weights.client().head() == version


async def test_of_two_learners_of_two_epochs_the_newer_stays(weights) -> None:
    old, new = weights.client(), weights.client()
    await weights.publish(old, 0, epoch=1)
    results = await asyncio.gather(
        old.publish(weights.key, weights.draft(1, epoch=1), weights.tensors(11), weights.assets),
        new.publish(weights.key, weights.draft(1, epoch=2), weights.tensors(12), weights.assets),
        return_exceptions=True,
    )
    # Whichever came first has the number; from then on the older one writes nothing.
    assert isinstance(results[0], Fenced) or isinstance(results[1], Conflict), results
    await weights.publish(new, 2, epoch=2)
    for version in (0, 1, 2, 3):
        with pytest.raises(Fenced):
            await weights.publish(old, version, epoch=1)
    assert await weights.client().head() == 2


async def test_a_slow_learners_delta_does_not_pass_a_newer_epoch(weights) -> None:
    """Admitted before the newer learner published, committed after."""
    names = {"key": weights.key, "job": weights.job}
    await send(weights, full_parcel(0, TENSORS[0], **names))
    slow = delta_parcel(1, TENSORS[1], 0, TENSORS[0], epoch=1, **names)
    go = asyncio.Event()

    async def slowly():
        yield weights_pb2.PublishRequest(header=slow.header)
        await go.wait()
        yield weights_pb2.PublishRequest(chunk=slow.parts[0])

    async with channel(weights.address) as opened:
        publishing = asyncio.ensure_future(weights_pb2_grpc.WeightsServiceStub(opened).Publish(slowly(), timeout=20))
        await asyncio.sleep(0.2)
        await send(weights, delta_parcel(1, TENSORS[2], 0, TENSORS[0], epoch=2, serial=5, **names))
        go.set()
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await publishing
    assert info.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (await weights.client().fetch(1)).tensors == tuple(TENSORS[2])


async def test_a_job_is_handed_over_to_another_key(weights) -> None:
    await weights.publish(weights.client(), 0)
    second = SigningKey.generate()
    signed = sign_rotation(weights.key, weights.job, second.public_key, 1, time.time())
    request = weights_pb2.RotateKeyRequest(rotation=signed)
    for _ in range(2):
        await call(weights, "RotateKey", request)
    told = await call(weights, "GetKeys", weights_pb2.GetKeysRequest(job=convert.job_to_proto(weights.job)))
    assert verify_chain(weights.job, told.public_key, told.rotations) == [weights.key.public_key, second.public_key]
    with pytest.raises(Fenced, match="superseded"):
        await weights.publish(weights.client(), 1)
    await weights.client(second).register_key(keep=3)
    writer = weights.client()
    await writer.publish(second, weights.draft(1), weights.tensors(1), weights.assets)
    # A reader who was given the first key believes both.
    reader = weights.client()
    for version in (0, 1):
        assert (await reader.fetch(version)).tensors == tuple(weights.tensors(version))
    again = sign_rotation(weights.key, weights.job, SigningKey.generate().public_key, 1, time.time())
    code = await refused(weights, "RotateKey", weights_pb2.RotateKeyRequest(rotation=again))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    forged = sign_rotation(SigningKey.generate(), weights.job, second.public_key, 2, time.time())
    code = await refused(weights, "RotateKey", weights_pb2.RotateKeyRequest(rotation=forged))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_store_tells_the_cheapest_path(weights) -> None:
    names = {"key": weights.key, "job": weights.job}
    await send(weights, full_parcel(0, TENSORS[0], **names))
    for version in (1, 2):
        await send(weights, delta_parcel(version, TENSORS[version], version - 1, TENSORS[version - 1], **names))

    async def path(*have: int, codecs=CODECS) -> list[int]:
        request = weights_pb2.GetVersionRequest(
            job=convert.job_to_proto(weights.job),
            version=2,
            weight_set=weights_pb2.WEIGHT_SET_POLICY,
            have=have,
            codecs=codecs,
        )
        return [step.version for step in (await call(weights, "GetVersion", request)).path]

    assert await path() == [0, 1, 2]
    assert await path(1) == [2]
    assert await path(0, 2) == []
    assert await path(codecs=[SAFETENSORS]) == []
    assert await path(77, -1 % 2**64) == [0, 1, 2]
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await path(*range(100, 165))
    assert info.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_delta_without_its_base_asks_for_a_full_publish(weights) -> None:
    names = {"key": weights.key, "job": weights.job}
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await send(weights, delta_parcel(5, TENSORS[1], 4, TENSORS[0], **names))
    assert info.value.code() is grpc.StatusCode.NOT_FOUND
    assert "full encoding" in (info.value.details() or "")


async def test_serving_and_channels_are_watched_back_and_forth(weights) -> None:
    client = weights.client()
    for version in range(3):
        await weights.publish(client, version)
    for serial, version in enumerate((2, 0, 1), start=1):
        for name in ("serving", "channel/canary"):
            signed = sign_pointer(weights.key, weights.job, name, version, serial, time.time() + 60)
            await call(weights, "SetPointer", weights_pb2.SetPointerRequest(pointer=signed))
            async with channel(weights.address) as opened:
                request = weights_pb2.WatchRequest(job=convert.job_to_proto(weights.job), pointer=name)
                async for response in weights_pb2_grpc.WeightsServiceStub(opened).Watch(request, timeout=20):
                    assert response.pointer == signed
                    break
    assert await client.head() == 2
