from __future__ import annotations

import asyncio

from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store.hub import PointerHub, State
from longshore.weight_store.incoming import Incoming
from longshore.weight_store.version import PointerState

JOB = JobRef("p", "j")


def at(serial: int) -> tuple[PointerState, weights_pb2.SignedPointer]:
    return PointerState(JOB, "head", serial, serial, 2e9), weights_pb2.SignedPointer(key_id=str(serial))


def serial_of(news: State | Incoming) -> int:
    assert isinstance(news, tuple)
    return news[0].serial


async def nothing() -> State:
    return None


async def test_a_move_while_the_store_is_read_is_not_missed() -> None:
    hub = PointerHub()
    reading, go = asyncio.Event(), asyncio.Event()

    async def slow() -> State:
        reading.set()
        await go.wait()
        return at(1)

    watch = hub.watch(JOB, "head", slow)
    first = asyncio.create_task(anext(watch))
    await reading.wait()
    hub.move(*at(2))
    go.set()
    assert serial_of(await first) == 1
    assert serial_of(await asyncio.wait_for(anext(watch), 5)) == 2
    await watch.aclose()


async def test_moves_out_of_order_end_at_the_newest() -> None:
    hub = PointerHub()
    watch = hub.watch(JOB, "head", nothing)
    assert await anext(watch) is None
    for serial in (2, 3, 1):
        hub.move(*at(serial))
    assert serial_of(await anext(watch)) == 3
    waiting = asyncio.create_task(anext(watch, "end"))
    await asyncio.sleep(0)
    hub.close()
    assert await asyncio.wait_for(waiting, 5) == "end"


async def test_a_topic_lives_as_long_as_it_is_watched() -> None:
    hub = PointerHub()
    watches = [hub.watch(JOB, "head", nothing) for _ in range(3)]
    for watch in watches:
        await anext(watch)
    assert len(hub._topics) == 1
    for watch in watches:
        await watch.aclose()
    assert not hub._topics
