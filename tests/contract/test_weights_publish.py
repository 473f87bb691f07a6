"""Publishing over real gRPC into a folder: what is accepted, what is refused, what readers get back."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import grpc
import pytest
import safetensors

from longshore.errors import Conflict, Fenced, IntegrityError, NotFound, Rejected, Unavailable
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.rpc.channel import channel
from longshore.signing import SigningKey
from longshore.weight_store.version import sign_pointer
from longshore.weights.client import Tensor, WeightsClient, checksum_of
from longshore.weights.parcel import Parcel, pack


def parcel(weights, version: int, serial: int = 1, key: SigningKey | None = None, epoch: int = 1) -> Parcel:
    draft, tensors = weights.draft(version, epoch), weights.tensors(version)
    return pack(weights.job, key or weights.key, draft, tensors, weights.assets, serial)


async def send(weights, parcel: Parcel, payload: bytes | None = None) -> weights_pb2.PublishResponse:
    """Publishes past the client, so that what it would never send can be sent."""

    async def messages():
        yield weights_pb2.PublishRequest(header=parcel.header)
        yield weights_pb2.PublishRequest(chunk=b"".join(parcel.parts) if payload is None else payload)

    async with channel(weights.address) as opened:
        return await weights_pb2_grpc.WeightsServiceStub(opened).Publish(messages(), timeout=20, wait_for_ready=True)


async def refused(weights, parcel: Parcel, payload: bytes | None = None) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await send(weights, parcel, payload)
    return info.value.code(), info.value.details() or ""


async def test_a_version_comes_back_as_it_was_published(weights) -> None:
    client = weights.client()
    assert await weights.publish(client, 7) is False
    policy = await weights.client().fetch(7)
    assert policy.tensors == tuple(weights.tensors(7))
    assert (policy.version, policy.train_step, policy.learner_epoch) == (7, 70, 1)
    assert policy.canaries == weights.draft(7).canaries
    assert policy.checksum == checksum_of(weights.tensors(7))
    assert await client.describe(7) == replace(policy, tensors=None)
    assert await client.assets(policy.assets_sha256) == weights.assets
    assert await client.head() == 7
    assert await client.versions() == [7]


async def test_a_payload_of_many_chunks_and_reads_comes_back(weights) -> None:
    """Over the spool's memory limit, the chunk size and the read size, with odd ends."""
    client = weights.client()
    data = hashlib.shake_256(b"seed").digest(9 * 1024 * 1024 + 6)
    tensors = [Tensor("w", "bfloat16", (len(data) // 2,), data), Tensor("empty", "float32", (0, 3), b"")]
    await client.publish(weights.key, weights.draft(0), tensors, weights.assets)
    assert (await weights.client().fetch(0)).tensors == tuple(tensors)


async def test_the_stored_blob_is_a_safetensors_file(weights) -> None:
    await weights.publish(weights.client(), 0)
    found = dict(safetensors.deserialize(weights.blobs[0].read_bytes()))
    assert {name: bytes(item["data"]) for name, item in found.items()} == {
        tensor.name: tensor.data for tensor in weights.tensors(0)
    }
    assert found["embed.weight"]["dtype"] == "BF16"


async def test_publishing_again_changes_nothing_and_mends_a_damaged_blob(weights) -> None:
    client = weights.client()
    await weights.publish(client, 0)
    weights.blobs[0].write_bytes(b"rubbish")
    with pytest.raises((IntegrityError, Unavailable)):
        await client.fetch(0)
    assert await weights.publish(client, 0) is True
    assert (await client.fetch(0)).tensors == tuple(weights.tensors(0))
    assert await client.versions() == [0]


async def test_another_manifest_under_a_number_is_a_conflict(weights) -> None:
    client = weights.client()
    await weights.publish(client, 0)
    with pytest.raises(Conflict) as info:
        await client.publish(weights.key, weights.draft(0), weights.tensors(99), weights.assets)
    assert not isinstance(info.value, Fenced)
    assert (await client.fetch(0)).tensors == tuple(weights.tensors(0))


async def test_an_older_epoch_is_fenced_even_when_it_repeats_itself(weights) -> None:
    old, new = weights.client(), weights.client()
    await weights.publish(old, 0, epoch=1)
    await weights.publish(new, 1, epoch=2)
    for version in (0, 2):
        with pytest.raises(Fenced):
            await weights.publish(old, version, epoch=1)
    assert await new.head() == 1
    assert await new.versions() == [1, 0]


async def test_a_head_that_is_set_back_is_refused_with_its_version(weights) -> None:
    await send(weights, parcel(weights, 0, serial=10))
    code, _ = await refused(weights, parcel(weights, 1, serial=10))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert await weights.client().versions() == [0]


async def test_a_clock_that_went_back_does_not_fence_a_learner(weights) -> None:
    await send(weights, parcel(weights, 0, serial=2**50))
    client = weights.client()
    await weights.publish(client, 1)
    assert await weights.client().head() == 1


async def test_a_wrong_signature_is_refused(weights) -> None:
    stranger = SigningKey.generate()
    code, details = await refused(weights, parcel(weights, 0, key=stranger))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "not a registered key" in details
    forged = parcel(weights, 0, key=stranger)
    forged.header.manifest.key_id = forged.header.head.key_id = weights.key.key_id
    code, details = await refused(weights, forged)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "signature" in details
    with pytest.raises(Rejected):
        await weights.client().publish(stranger, weights.draft(0), weights.tensors(0), weights.assets)
    assert await weights.client().versions() == []


async def test_a_manifest_that_was_changed_after_signing_is_refused(weights) -> None:
    changed, other = parcel(weights, 0), parcel(weights, 0, epoch=2)
    changed.header.manifest.manifest = other.header.manifest.manifest
    code, details = await refused(weights, changed)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "signature" in details


async def test_a_manifests_signature_does_not_pass_for_a_pointers(weights) -> None:
    crossed = parcel(weights, 0)
    crossed.header.head.pointer = crossed.header.manifest.manifest
    crossed.header.head.signature = crossed.header.manifest.signature
    assert (await refused(weights, crossed))[0] is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda payload: payload[:-1], id="truncated"),
        pytest.param(lambda payload: payload + b"\0", id="longer"),
        pytest.param(lambda payload: payload[:-1] + bytes([payload[-1] ^ 1]), id="flipped"),
        pytest.param(lambda payload: b"\xff" * len(payload), id="rubbish"),
    ],
)
async def test_a_payload_that_does_not_match_is_refused(weights, spoil) -> None:
    good = parcel(weights, 0)
    code, _ = await refused(weights, good, spoil(b"".join(good.parts)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert not list(weights.job_folder.glob("versions/**/manifest"))


async def test_tensors_are_checked_even_when_the_payloads_own_checksum_fits(weights) -> None:
    other = parcel(weights, 0)
    payload = bytearray(b"".join(other.parts))
    payload[-1] ^= 1
    other.header.encoding.sha256 = hashlib.sha256(payload).digest()
    code, details = await refused(weights, other, bytes(payload))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "norm.weight" in details


async def test_a_header_larger_than_its_tensors_need_is_refused(weights) -> None:
    huge = parcel(weights, 0)
    huge.header.encoding.size = 2**40
    assert (await refused(weights, huge))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_assets_are_needed_once_and_checked(weights) -> None:
    without = parcel(weights, 0)
    without.header.ClearField("assets")
    assert (await refused(weights, without))[0] is grpc.StatusCode.INVALID_ARGUMENT
    spoiled = parcel(weights, 0)
    spoiled.header.assets += b"x"
    assert (await refused(weights, spoiled))[0] is grpc.StatusCode.INVALID_ARGUMENT
    await send(weights, parcel(weights, 0, serial=1))
    without = parcel(weights, 1, serial=2)
    without.header.ClearField("assets")
    assert (await send(weights, without)).existed is False


async def test_a_job_has_one_key(weights) -> None:
    await weights.client().register_key(keep=5)
    with pytest.raises(Conflict) as info:
        await weights.client(SigningKey.generate()).register_key(keep=5)
    assert not isinstance(info.value, Fenced)
    with pytest.raises(Rejected):
        await weights.client().register_key(keep=0)


async def test_names_that_lead_elsewhere_are_refused(weights) -> None:
    stub = weights_pb2_grpc.WeightsServiceStub(weights.client()._channel)
    for project in ("..", "a/b", ".hidden", "A"):
        request = weights_pb2.RegisterKeyRequest(public_key=weights.key.public_key, keep=1)
        request.job.project, request.job.job = project, "job"
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await stub.RegisterKey(request, timeout=5)
        assert info.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    signed = sign_pointer(weights.key, weights.job, "pin/../../keep", 0, 1, 2e9)
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await stub.SetPointer(weights_pb2.SetPointerRequest(pointer=signed), timeout=5)
    assert info.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_was_never_published_is_not_found(weights) -> None:
    client = weights.client()
    with pytest.raises(NotFound):
        await client.head(timeout=5)
    with pytest.raises(NotFound):
        await client.fetch(0)
    with pytest.raises(NotFound):
        await client.assets("00" * 32)
    assert await client.versions() == []


async def test_retention_keeps_the_newest_and_what_pointers_name(weights) -> None:
    client = weights.client()
    await weights.publish(client, 0)
    pin = sign_pointer(weights.key, weights.job, "pin/best", 0, 1, 2e10)
    stub = weights_pb2_grpc.WeightsServiceStub(client._channel)
    await stub.SetPointer(weights_pb2.SetPointerRequest(pointer=pin), timeout=5)
    for version in range(1, 7):
        # From new clients, who publish in full: a delta would hold its base.
        await weights.publish(weights.client(), version)
    assert await client.versions() == [6, 5, 4, 0]
    assert len(weights.full_blobs) == 4
    for version in (0, 4, 6):
        assert (await client.fetch(version)).tensors == tuple(weights.tensors(version))
    with pytest.raises(NotFound):
        await client.fetch(1)


async def test_a_full_disk_is_said_to_be_one(weights, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longshore.weight_store.objects.obstore.put", full)
    code, _ = await refused(weights, parcel(weights, 0))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_publish_waits_for_a_store_that_is_away(stopped_weights) -> None:
    weights = stopped_weights
    client = weights.client()
    with pytest.raises(Unavailable):
        await client.versions(timeout=0.3)
    await weights.start()
    await client.register_key(keep=3)
    assert await weights.publish(client, 0) is False


async def test_a_flipped_bit_in_a_stored_blob_is_found_by_the_reader(weights) -> None:
    client: WeightsClient = weights.client()
    await weights.publish(client, 0)
    data = bytearray(weights.blobs[0].read_bytes())
    data[-1] ^= 0x10
    weights.blobs[0].write_bytes(data)
    with pytest.raises(IntegrityError, match=r"norm\.weight"):
        await client.fetch(0)
