"""Following the head: proofs, refusals, retries, skipping. The source is a fake; the engine is the real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from follower_bench import ASSETS, CANARY, WAIT_S, Bench, refusals
from tiny_llama import canary_logprobs, config_json, published, tiny_model

from longshore.errors import ConfigError
from longshore.generator import follower as follower_module
from longshore.weights.client import CanaryProbe


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(follower_module, "FIRST_PAUSE_S", 0.01)
    bench = Bench()
    yield bench
    await bench.close()


async def test_serves_the_first_version_and_every_one_that_follows(bench: Bench) -> None:
    for version in (0, 1, 2):
        bench.store.publish(version)
        await bench.until(lambda version=version: bench.serving[-1:] == [version])  # type: ignore[misc]
    assert bench.serving == [0, 1, 2]
    assert bench.engine is not None


async def test_goes_to_the_newest_and_skips_what_lies_between(bench: Bench) -> None:
    bench.store.gate.clear()
    bench.store.publish(0)
    await bench.until(lambda: bench.store.fetched == [0])
    for version in (1, 2, 3):
        bench.store.publish(version)
    await asyncio.sleep(0.01)
    bench.store.gate.set()
    await bench.until(lambda: bench.serving[-1:] == [3])
    assert bench.serving == [0, 3]


async def test_follows_a_head_that_is_set_back(bench: Bench) -> None:
    for version in (4, 2):
        bench.store.publish(version)
        await bench.until(lambda version=version: bench.serving[-1:] == [version])  # type: ignore[misc]


def wrong(values: tuple[float, ...], by: float) -> tuple[CanaryProbe, ...]:
    return (CanaryProbe(CANARY, (*values[:-1], values[-1] + by)),)


@pytest.mark.parametrize(
    "canaries",
    [
        (),
        (CanaryProbe((1,), ()),),
        wrong(canary_logprobs(tiny_model(1), CANARY), 0.01),
        wrong(canary_logprobs(tiny_model(1), CANARY), float("nan")),
        (CanaryProbe((1, 10_000), (-1.0,)),),
    ],
)
async def test_an_unproven_version_is_never_served(bench: Bench, canaries: tuple[CanaryProbe, ...]) -> None:
    bench.store.publish(0)
    await bench.until(lambda: bench.serving == [0])
    bench.store.publish(1, canaries=canaries)
    # Refused more than once: it is tried again in case the fault was ours.
    await bench.until(lambda: refusals("IntegrityError") >= 2)
    assert bench.engine is not None
    assert bench.engine.status().version == 0
    assert bench.serving == [0]
    bench.store.publish(2)
    await bench.until(lambda: bench.serving == [0, 2])


async def test_broken_weights_are_not_served_even_with_a_right_canary(bench: Bench) -> None:
    bench.store.publish(0)
    await bench.until(lambda: bench.serving == [0])
    bench.store.publish(1, tensors=published(tiny_model(7)))
    await bench.until(lambda: refusals("IntegrityError") >= 1)
    assert bench.serving == [0]


async def test_a_failed_fetch_is_repeated(bench: Bench) -> None:
    bench.store.failures = 3
    bench.store.publish(0)
    await bench.until(lambda: bench.serving == [0])
    assert bench.store.fetched == [0, 0, 0, 0]
    assert refusals("Unavailable") == 3


async def test_a_head_that_moves_ends_the_pause(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower_module, "FIRST_PAUSE_S", 3600.0)
    bench.store.failures = 1
    bench.store.publish(0)
    await bench.until(lambda: refusals("Unavailable") == 1)
    bench.store.publish(1)
    await bench.until(lambda: bench.serving == [1])


async def test_equal_assets_under_another_name_are_the_same_model(bench: Bench) -> None:
    bench.store.publish(0)
    bench.store.bundles["b" * 64] = dict(bench.store.bundles[ASSETS])
    bench.store.publish(1, assets_sha256="b" * 64)
    await bench.until(lambda: bench.serving[-1:] == [1])


async def test_a_later_version_of_another_model_is_refused(bench: Bench) -> None:
    bench.store.publish(0)
    await bench.until(lambda: bench.serving == [0])
    document = json.loads(config_json(tiny_model(0))) | {"rope_parameters": {"rope_type": "llama3"}}
    bench.store.bundles["b" * 64] = {"config.json": json.dumps(document).encode()}
    bench.store.publish(1, assets_sha256="b" * 64)
    await bench.until(lambda: refusals("IntegrityError") >= 1)
    assert bench.serving == [0]


async def test_a_first_version_of_an_unknown_model_ends_the_process(bench: Bench) -> None:
    document = json.loads(config_json(tiny_model(0))) | {"architectures": ["MambaForCausalLM"]}
    bench.store.bundles[ASSETS] = {"config.json": json.dumps(document).encode()}
    bench.store.publish(0)
    with pytest.raises(ConfigError, match="MambaForCausalLM"):
        await asyncio.wait_for(bench.task, WAIT_S)
