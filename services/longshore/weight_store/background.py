"""Runs a store's upkeep beside an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

from longshore.weight_store.upkeep import Upkeep


async def keep_up(upkeep: Upkeep, stop: asyncio.Event, patience_s: float = 2.0) -> None:
    """Runs `upkeep` in a thread of its own until `stop`, and raises what it raises.

    What it is doing at the end is given `patience_s` seconds, and is then left: it may be cut off anywhere.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Any] = loop.create_future()

    def end(error: BaseException | None) -> None:
        if not ended.done():
            ended.set_result(None) if error is None else ended.set_exception(error)

    def work() -> None:
        error = None
        try:
            upkeep.run()
        except BaseException as raised:  # noqa: BLE001 - the thread's end: the event loop raises it
            error = raised
        # The loop may be gone if our patience was.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(end, error)

    threading.Thread(target=work, name="upkeep", daemon=True).start()
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([ended, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        upkeep.stop()
    await asyncio.wait({ended}, timeout=patience_s)
    if ended.done():
        ended.result()
