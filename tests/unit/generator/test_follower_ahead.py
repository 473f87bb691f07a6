"""Versions that come before their pointer, pointers of any name, and versions beside the one that is followed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping

import pytest
import torch
from follower_bench import WAIT_S, Bench, expected, refusals, scores

from longshore.errors import IntegrityError, NotFound, Unavailable
from longshore.generator import follower as follower_module
from longshore.generator.canary import Proof


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(follower_module, "FIRST_PAUSE_S", 0.01)
    bench = Bench()
    yield bench
    await bench.close()


@pytest.fixture
async def roomy() -> AsyncIterator[Bench]:
    """With room for two versions."""
    bench = Bench(residents=2)
    yield bench
    await bench.close()


async def test_what_was_staged_ahead_is_not_staged_again(bench: Bench) -> None:
    await bench.serve(0)
    bench.store.push(1)
    await bench.until(lambda: bench.staged == [0, 1])
    await asyncio.sleep(0.02)
    assert bench.serving == [0]
    assert bench.status.version == 0
    bench.store.point(1)
    await bench.until(lambda: bench.serving == [0, 1])
    assert bench.staged == [0, 1]
    torch.testing.assert_close(scores(bench), expected(1), atol=1e-4, rtol=0)


async def test_what_was_withdrawn_is_staged_anew_when_its_number_comes_with_other_weights(bench: Bench) -> None:
    await bench.serve(0)
    bench.store.push(1, seed=8)
    await bench.until(lambda: bench.staged == [0, 1])
    await bench.serve(1, seed=9)
    assert bench.staged == [0, 1, 1]
    torch.testing.assert_close(scores(bench), expected(9), atol=1e-4, rtol=0)


async def test_what_was_withdrawn_for_good_leaves_no_trace(bench: Bench) -> None:
    await bench.serve(0)
    bench.store.push(1)
    await bench.until(lambda: bench.staged == [0, 1])
    del bench.store.versions[1]
    await bench.serve(2)
    torch.testing.assert_close(scores(bench), expected(2), atol=1e-4, rtol=0)
    assert bench.serving == [0, 2]


async def test_news_of_what_is_gone_already_is_no_refusal(bench: Bench) -> None:
    await bench.serve(0)
    bench.store.push(1)
    del bench.store.versions[1]
    await bench.until(lambda: bench.store.fetched[-1] == 1)
    await bench.serve(2)
    assert refusals("NotFound") == 0


async def test_an_unproven_version_ahead_changes_nothing_until_it_is_pointed_to(bench: Bench) -> None:
    await bench.serve(0)
    bench.store.push(1, canaries=())
    await bench.until(lambda: 1 in bench.staged)
    await asyncio.sleep(0.02)
    assert refusals("IntegrityError") == 0
    bench.store.point(1)
    await bench.until(lambda: refusals("IntegrityError") >= 1)
    assert bench.serving == [0]
    await bench.serve(2)
    torch.testing.assert_close(scores(bench), expected(2), atol=1e-4, rtol=0)


async def test_the_newest_of_what_came_ahead_is_staged(bench: Bench) -> None:
    await bench.serve(0)
    bench.store.gate.clear()
    for version in (1, 2, 3):
        bench.store.push(version)
    await asyncio.sleep(0.02)
    bench.store.gate.set()
    await bench.until(lambda: bench.staged[-1] == 3)
    bench.store.point(3)
    await bench.until(lambda: bench.serving == [0, 3])
    assert bench.staged.count(3) == 1


async def test_a_pointer_that_moves_back_swaps_back(bench: Bench) -> None:
    for version in (0, 1, 2):
        await bench.serve(version)
    bench.store.push(3)
    await bench.until(lambda: bench.staged[-1] == 3)
    bench.store.point(1)
    await bench.until(lambda: bench.serving[-1] == 1)
    torch.testing.assert_close(scores(bench), expected(1), atol=1e-4, rtol=0)
    bench.store.point(3)
    await bench.until(lambda: bench.serving[-1] == 3)
    torch.testing.assert_close(scores(bench), expected(3), atol=1e-4, rtol=0)
    assert bench.serving == [0, 1, 2, 1, 3]


@pytest.mark.parametrize("pointer", ["serving", "channel/canary", "pin/best"])
async def test_any_pointer_can_be_followed(pointer: str) -> None:
    bench = Bench(pointer)
    try:
        await bench.serve(5)
        await bench.serve(3)
    finally:
        await bench.close()


async def test_a_kept_version_is_beside_the_served_one(roomy: Bench) -> None:
    await roomy.serve(0)
    roomy.store.publish(7, head=False)
    await roomy.follower.keep(7)
    assert (roomy.status.version, roomy.status.beside) == (0, (7,))
    # Once it is there nothing is fetched for it, nor for the served one.
    fetched = len(roomy.store.fetched)
    await roomy.follower.keep(7)
    await roomy.follower.keep(0)
    assert len(roomy.store.fetched) == fetched
    await roomy.serve(1)
    assert (roomy.status.version, roomy.status.beside) == (1, (7,))
    await roomy.serve(7)
    assert (roomy.status.version, roomy.status.beside) == (7, ())


async def test_keeping_takes_turns_with_what_was_staged_ahead(roomy: Bench) -> None:
    await roomy.serve(0)
    roomy.store.push(1)
    await roomy.until(lambda: roomy.staged == [0, 1])
    roomy.store.publish(7, head=False)
    await roomy.follower.keep(7)
    roomy.store.point(1)
    await roomy.until(lambda: roomy.serving == [0, 1])
    torch.testing.assert_close(scores(roomy), expected(1), atol=1e-4, rtol=0)
    assert roomy.status.beside == (7,)


async def test_the_version_that_was_staged_ahead_can_be_kept_once_it_is_published(roomy: Bench) -> None:
    await roomy.serve(0)
    roomy.store.push(1)
    await roomy.until(lambda: roomy.staged == [0, 1])
    with pytest.raises(NotFound):
        await roomy.follower.keep(1)
    assert roomy.status.beside == ()
    # Its pointer is still on the way.
    roomy.store.withheld.clear()
    await roomy.follower.keep(1)
    assert (roomy.staged, roomy.status.beside) == ([0, 1], (1,))
    roomy.store.point(1)
    await roomy.until(lambda: roomy.serving == [0, 1])
    assert (roomy.status.version, roomy.status.beside) == (1, ())


async def test_many_who_ask_for_one_version_cause_one_staging(roomy: Bench) -> None:
    await roomy.serve(0)
    roomy.store.publish(7, head=False)
    await asyncio.gather(*(roomy.follower.keep(7) for _ in range(4)))
    assert roomy.staged == [0, 7]


async def test_staging_for_a_request_that_has_gone_ends_before_another_begins(roomy: Bench) -> None:
    """Else the weights of one could be swapped in as those of the other, unproven."""
    await roomy.serve(0)
    assert roomy.engine is not None
    stage, busy, go, overlaps = roomy.engine.stage, threading.Lock(), threading.Event(), []

    def slow(version: int, tensors: Mapping[str, torch.Tensor], proof: Proof) -> None:
        if not busy.acquire(blocking=False):
            overlaps.append(version)
            return
        try:
            stage(version, tensors, proof)
            assert version != 7 or go.wait(WAIT_S)
        finally:
            busy.release()

    roomy.engine.stage = slow  # type: ignore[method-assign]
    roomy.store.publish(7, head=False)
    asked = asyncio.create_task(roomy.follower.keep(7))
    await roomy.until(lambda: roomy.staged == [0, 7])
    asked.cancel()
    roomy.store.publish(1)
    await asyncio.sleep(0.05)
    go.set()
    await roomy.until(lambda: roomy.serving == [0, 1])
    assert asked.cancelled()
    assert overlaps == []
    assert roomy.status.beside == (7,)
    torch.testing.assert_close(scores(roomy), expected(1), atol=1e-4, rtol=0)


async def test_what_cannot_be_kept(bench: Bench, roomy: Bench) -> None:
    with pytest.raises(Unavailable, match="no policy version"):
        await bench.follower.keep(0)
    await bench.serve(0)
    await roomy.serve(0)
    bench.store.publish(7, head=False)
    with pytest.raises(Unavailable, match="no room for version 7"):
        await bench.follower.keep(7)
    with pytest.raises(NotFound):
        await roomy.follower.keep(7)
    roomy.store.publish(7, head=False, canaries=())
    with pytest.raises(IntegrityError):
        await roomy.follower.keep(7)
    assert (roomy.status.version, roomy.status.beside) == (0, ())
    for each in (bench, roomy):
        await each.serve(1)
        torch.testing.assert_close(scores(each), expected(1), atol=1e-4, rtol=0)
