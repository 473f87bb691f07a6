"""Ctrl-C, SIGTERM and SIGHUP: the first one ends the work in order, any further one hurries the end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """What has been asked of this process, and how to hurry what is being stopped."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.on_first: Callable[[], None] = lambda: None
        self.on_hurry: Callable[[], None] = lambda: None


def run_interruptible(work: Callable[[Interrupt], Coroutine[Any, Any, int]]) -> int:
    """Runs `work` in a new event loop and returns its exit code, or 128 + the signal that ended it.

    The first signal cancels `work`, once; its cleaning up is never cancelled.
    """
    try:
        return asyncio.run(_run(work))
    finally:
        # Everything is stopped: a key pressed once more is not worth a traceback from a closing interpreter.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


async def _run(work: Callable[[Interrupt], Coroutine[Any, Any, int]]) -> int:
    interrupt = Interrupt()
    task = asyncio.create_task(work(interrupt))

    def on_signal(number: int) -> None:
        if interrupt.signal is None:
            interrupt.signal = number
            interrupt.on_first()
            task.cancel()
        else:
            interrupt.on_hurry()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        # Whoever starts us with nohup wants us to outlive the terminal.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal, number)
    try:
        return await task
    except asyncio.CancelledError:
        assert interrupt.signal is not None, "nobody else cancels this task"
        return 128 + interrupt.signal
