"""The publisher of adapters, over a real store: one base, then versions beside it, through whatever restarts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_model
from weight_origin import ASSETS, weight_origin

from longshore.config import LoraSpec
from longshore.learner.lora import Adapters, merged_parameters
from longshore.learner.published import Weights, published
from longshore.learner.publisher import Lineage, Publisher, VersionLog
from longshore.learner.trainer import canary_logprobs
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weights.client import PolicyVersion, WeightsClient

CANARY = [5, 9, 3, 30, 7, 7, 12]
JOB = JobRef("p", "j")
LINEAGE = Lineage(0, 1, None)


def policy(trained: int = 0) -> torch.nn.Module:
    """With adapters that were trained so many steps."""
    torch.set_num_threads(1)
    model = tiny_model(3)
    Adapters(model, LoraSpec(rank=2, alpha=4.0), 1)
    train(model, trained)
    return model


def train(model: torch.nn.Module, times: int = 1) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                for _ in range(times):
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))


def values(weights: Weights) -> list[bytes]:
    return [bytes(tensor.data) for tensor in weights.tensors]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_published_is_the_base_and_what_the_adapters_add(dtype: str) -> None:
    model = policy(trained=2)
    weights = published(model, dtype, CANARY)
    assert weights.adapted is not None
    own = {
        tensor.name: torch.frombuffer(bytearray(tensor.data), dtype=getattr(torch, dtype)) for tensor in weights.tensors
    }
    rounding = 1e-6 if dtype == "float32" else 2**-8
    for (name, value), plain in zip(merged_parameters(model).items(), tiny_model(3).parameters(), strict=True):
        # The base is rounded for itself, because it was published for itself.
        added = plain.detach().to(getattr(torch, dtype)).float() + (value - plain.detach())
        torch.testing.assert_close(own[name].float(), added.flatten(), rtol=rounding, atol=rounding / 10)
    plain = tiny_model(3)
    plain.load_state_dict({name: own[name].view(value.shape) for name, value in plain.named_parameters()}, strict=False)
    assert weights.canary.logprobs == pytest.approx(canary_logprobs(plain, CANARY), abs=1e-5)
    before = values(weights)
    train(model)
    assert values(weights) == before, "training goes on"
    later = published(model, dtype, CANARY, weights.adapted.base)
    assert later.adapted is not None
    assert later.adapted.base is weights.adapted.base
    assert values(later) == values(published(model, dtype, CANARY))
    assert values(later) != before


def test_without_adapters_a_copy_is_published() -> None:
    model = tiny_model(3)
    weights = published(model, "float32", CANARY)
    assert weights.adapted is None
    before = values(weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert values(weights) == before
    assert values(published(model, "float32", CANARY)) != before


class Learners:
    """Incarnations of one job's learner: each a publisher that knows what is on the disk."""

    def __init__(self, address: str, folder: Path) -> None:
        self.folder = folder
        self.client = WeightsClient(address, JOB, SigningKey.create(folder / "key").public_key)

    async def begin(self) -> Publisher:
        log = VersionLog(self.folder / "versions.jsonl")
        publisher = Publisher(self.client, self.folder / "key", ASSETS, "float32", CANARY, log)
        self.client._sent = None
        await publisher.start()
        return publisher

    async def version(self, number: int) -> PolicyVersion:
        return await self.client.fetch(number)

    def adapters(self) -> int:
        """Versions that came as one."""
        blobs = [path.read_bytes()[:4] for path in self.folder.rglob("blobs/*")]
        return blobs.count(b"LSA\x01")


@pytest.fixture
async def learners(tmp_path: Path) -> AsyncIterator[Learners]:
    async with weight_origin(tmp_path / "store") as address:
        learners = Learners(address, tmp_path)
        await learners.client.register_key(keep=50)
        yield learners
        await learners.client.close()


async def numbers(publisher: Publisher, model: torch.nn.Module, wanted: Sequence[int]) -> list[int]:
    """Publishes once for each wanted number, training in between."""
    given = []
    for number in wanted:
        given.append(await publisher.publish(model, number, LINEAGE))
        await publisher.wait()
        train(model)
    return given


async def test_the_first_version_is_the_base_and_later_ones_are_beside_it(learners: Learners) -> None:
    model = policy()
    assert await numbers(await learners.begin(), model, [0, 1, 2]) == [0, 1, 2]
    assert learners.adapters() == 2
    assert (await learners.version(0)).tensors == tuple(published(policy(), "float32", CANARY).tensors)
    assert (await learners.version(2)).tensors == tuple(published(policy(trained=2), "float32", CANARY).tensors)
    assert await learners.client.head() == 2


async def test_after_a_warm_start_the_base_comes_first_and_head_never_names_it(learners: Learners) -> None:
    publisher = await learners.begin()
    model = policy(trained=3)
    assert await numbers(publisher, model, [0, 2]) == [1, 2]
    assert learners.adapters() == 2
    base = await learners.version(0)
    assert base.tensors == tuple(published(policy(), "float32", CANARY).tensors)
    assert base.canaries[0].logprobs == pytest.approx(canary_logprobs(tiny_model(3), CANARY), abs=1e-5)
    pointers = await learners.client.pointers()
    assert [(pointer.name, pointer.version) for pointer in pointers] == [("head", 2)]


async def test_an_incarnation_goes_on_beside_the_same_base(learners: Learners) -> None:
    await numbers(await learners.begin(), policy(trained=3), [0, 2, 3])
    # From the first checkpoint, whose number was 0, and from a later one: equal weights are the version that they were.
    assert await numbers(await learners.begin(), policy(trained=3), [0, 2, 3, 4]) == [1, 2, 3, 4]
    assert learners.adapters() == 4
    again = await learners.begin()
    other = policy(trained=9)
    assert await numbers(again, other, [3]) == [5]
    assert learners.adapters() == 5


async def test_one_that_died_between_base_and_version_goes_on(learners: Learners) -> None:
    publisher = await learners.begin()
    # It dies there.
    publisher._send = None  # type: ignore[assignment]
    with contextlib.suppress(TypeError):
        await publisher.publish(policy(trained=3), 0, LINEAGE)
    assert await learners.client.versions() == [0]
    assert await numbers(await learners.begin(), policy(trained=3), [0, 2]) == [1, 2]
    assert learners.adapters() == 2


async def test_an_incarnation_that_forgot_its_log_publishes_a_base_anew(learners: Learners) -> None:
    await numbers(await learners.begin(), policy(trained=3), [0, 2])
    (learners.folder / "versions.jsonl").unlink()
    model = policy(trained=6)
    assert await numbers(await learners.begin(), model, [5, 6]) == [6, 7]
    assert learners.adapters() == 4
    assert (await learners.version(7)).tensors == tuple(published(policy(trained=7), "float32", CANARY).tensors)


async def test_a_product_that_is_no_smaller_than_its_tensor_goes_as_ever(learners: Learners) -> None:
    model = tiny_model(3)
    Adapters(model, LoraSpec(rank=64, alpha=4.0), 1)
    assert await numbers(await learners.begin(), model, [0, 1, 2]) == [0, 1, 2]
    assert learners.adapters() == 0
