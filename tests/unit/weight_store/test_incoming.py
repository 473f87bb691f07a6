"""A publish under way: who reads it gets every byte, or is told that they will not come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from longshore.errors import Unavailable
from longshore.proto.v1 import weights_pb2
from longshore.weight_store.incoming import SENT_CHUNK_BYTES, Incoming
from longshore.weight_store.objects import StorageFull

WAIT_S = 10.0


def incoming(size: int, folder: Path | None = None) -> Incoming:
    encoding = weights_pb2.Encoding(size=size)
    return Incoming(3, weights_pb2.SignedManifest(), encoding, None if folder is None else str(folder))


async def read(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def test_readers_get_the_bytes_as_they_come_and_late_ones_from_the_first() -> None:
    publish = incoming(6)
    with publish.reading() as early:
        first = asyncio.create_task(anext(early))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert not first.done()
        await publish.write(b"abc")
        assert await asyncio.wait_for(first, WAIT_S) == b"abc"
        with publish.reading() as late:
            await publish.write(b"def")
            assert await asyncio.wait_for(read(late), WAIT_S) == b"abcdef"
        assert await asyncio.wait_for(read(early), WAIT_S) == b"def"
    publish.close()


async def test_who_has_begun_goes_on_when_the_publish_is_at_its_end() -> None:
    publish = incoming(3)
    with publish.reading() as chunks:
        await publish.write(b"abc")
        publish.settle(True)
        publish.close()
        assert await asyncio.wait_for(read(chunks), WAIT_S) == b"abc"
    assert await publish.settled() is True


async def test_bytes_that_will_not_come_are_told() -> None:
    publish = incoming(6)
    with publish.reading() as chunks:
        await publish.write(b"abc")
        assert await anext(chunks) == b"abc"
        waiting = asyncio.create_task(anext(chunks))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        publish.settle(False)
        with pytest.raises(Unavailable, match="version 3 broke off"):
            await asyncio.wait_for(waiting, WAIT_S)
    publish.close()


async def test_how_it_ended_is_said_once() -> None:
    publish = incoming(1)
    waiting = asyncio.create_task(publish.settled())
    await asyncio.sleep(0)
    assert not waiting.done()
    publish.settle(False)
    publish.settle(True)
    assert await asyncio.wait_for(waiting, WAIT_S) is False
    # One who gives up waiting takes nothing from the others.
    late = asyncio.create_task(publish.settled())
    late.cancel()
    await asyncio.sleep(0)
    assert await publish.settled() is False
    publish.close()


async def test_what_is_sent_is_cut_into_chunks() -> None:
    size = 2 * SENT_CHUNK_BYTES + 5
    publish = incoming(size)
    await publish.write(b"x" * size)
    with publish.reading() as chunks:
        assert [len(chunk) async for chunk in chunks] == [SENT_CHUNK_BYTES, SENT_CHUNK_BYTES, 5]
    publish.close()


async def test_the_file_has_no_name_and_no_room_is_said_to_be_that(tmp_path: Path) -> None:
    publish = incoming(3, tmp_path)
    await publish.write(b"abc")
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240 - a local folder
    publish.close()
    with pytest.raises(StorageFull):
        incoming(3, tmp_path / "not there")
