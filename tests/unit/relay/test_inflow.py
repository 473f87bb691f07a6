"""Bytes on their way in: order, bounds, and who is told when they end."""

from __future__ import annotations

import asyncio

import pytest

from longshore.errors import IntegrityError, Rejected, Unavailable
from longshore.proto.v1 import weights_pb2
from longshore.relay.inflow import BUFFERED_CHUNKS, Inflow

WAIT_S = 10.0


def path(*sizes: int) -> list[weights_pb2.PathStep]:
    return [
        weights_pb2.PathStep(version=number, encoding=weights_pb2.Encoding(sha256=bytes([number]) * 32, size=size))
        for number, size in enumerate(sizes)
    ]


async def read(inflow: Inflow) -> bytes:
    return b"".join([chunk async for chunk in inflow.chunks()])


async def test_bytes_come_out_as_they_went_in_while_they_come() -> None:
    inflow = Inflow(path(6))
    chunks = inflow.chunks()
    await inflow.add(b"abc")
    assert await anext(chunks) == b"abc"
    assert not inflow.whole
    await inflow.add(b"def")
    assert inflow.whole
    assert await anext(chunks) == b"def"
    assert await anext(chunks, None) is None


async def test_a_confirmed_inflow_gives_the_rest() -> None:
    inflow = Inflow(path(6))
    for chunk in (b"ab", b"cd", b"ef"):
        await inflow.add(chunk)
    inflow.confirm()
    assert await asyncio.wait_for(read(inflow), WAIT_S) == b"abcdef"
    await inflow.confirmed()


async def test_nothing_is_confirmed_before_it_is_said() -> None:
    inflow = Inflow(path(1))
    await inflow.add(b"a")
    waiting = asyncio.create_task(inflow.confirmed())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    inflow.confirm()
    await asyncio.wait_for(waiting, WAIT_S)


async def test_a_slow_reader_holds_up_the_writer() -> None:
    inflow = Inflow(path(BUFFERED_CHUNKS + 1))
    for _ in range(BUFFERED_CHUNKS):
        await asyncio.wait_for(inflow.add(b"x"), WAIT_S)
    adding = asyncio.create_task(inflow.add(b"x"))
    await asyncio.sleep(0.01)
    assert not adding.done()
    assert len(await asyncio.wait_for(read(inflow), WAIT_S)) == BUFFERED_CHUNKS + 1
    await asyncio.wait_for(adding, WAIT_S)


async def test_a_reader_that_failed_lets_the_writer_go_and_says_why() -> None:
    inflow = Inflow(path(100))
    for _ in range(BUFFERED_CHUNKS):
        await inflow.add(b"x")
    adding = asyncio.create_task(inflow.add(b"x"))
    await asyncio.sleep(0.01)
    assert not inflow.failed
    inflow.fail(Unavailable("the disk is full"))
    assert inflow.failed
    with pytest.raises(Unavailable, match="disk"):
        await asyncio.wait_for(adding, WAIT_S)


async def test_a_writer_that_gave_up_ends_the_reader_and_who_waits() -> None:
    inflow = Inflow(path(4))
    await inflow.add(b"ab")
    reading = asyncio.create_task(read(inflow))
    await asyncio.sleep(0.01)
    inflow.fail(IntegrityError("no more"))
    inflow.confirm()
    for waiting in (reading, asyncio.create_task(inflow.confirmed())):
        with pytest.raises(IntegrityError, match="no more"):
            await asyncio.wait_for(waiting, WAIT_S)


async def test_more_bytes_than_were_announced_are_refused_and_fail_the_reader() -> None:
    inflow = Inflow(path(2, 2))
    with pytest.raises(Rejected, match="more than the 4 bytes"):
        await inflow.add(b"abcde")
    with pytest.raises(Rejected):
        await asyncio.wait_for(read(inflow), WAIT_S)


async def test_a_path_of_several_encodings_is_cut_where_they_end() -> None:
    inflow = Inflow(path(3, 2, 4))
    for chunk in (b"a", b"bcDE", b"fg", b"hi"):
        await inflow.add(chunk)
    assert inflow.whole
    assert await asyncio.wait_for(inflow.payloads(), WAIT_S) == [b"abc", b"DE", b"fghi"]


async def test_a_path_of_several_encodings_waits_for_no_reader() -> None:
    count = 3 * BUFFERED_CHUNKS
    inflow = Inflow(path(count, 1))
    for _ in range(count + 1):
        await asyncio.wait_for(inflow.add(b"x"), WAIT_S)
    assert inflow.whole


@pytest.mark.parametrize(
    ("received", "next_"),
    [(0, (0, 0, 3)), (1, (0, 1, 2)), (3, (1, 0, 2)), (4, (1, 1, 1)), (5, (2, 0, 4)), (8, (2, 3, 1))],
)
async def test_it_says_what_comes_next(received: int, next_: tuple[int, int, int]) -> None:
    inflow = Inflow(path(3, 2, 4))
    if received:
        await inflow.add(b"x" * received)
    number, offset, missing = next_
    assert inflow.next == (bytes([number]) * 32, offset, missing)
