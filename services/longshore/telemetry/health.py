"""Whether this process serves, for who asks over plain HTTP: /healthz beside /metrics.

A container's health check must not start a Python that imports gRPC every few seconds: kubelet gets a page.
"""

from __future__ import annotations

import asyncio
import concurrent.futures

_ANSWER_S = 5.0


class ProcessHealth:
    """Said by the gRPC server, asked by the metrics server's threads."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def serving(self, loop: asyncio.AbstractEventLoop) -> None:
        """From here on the process serves by this loop."""
        self._loop = loop

    def ended(self) -> None:
        """It serves no more, or takes nothing new."""
        self._loop = None

    def serves(self) -> bool:
        """Whether it serves, and its loop answers within 5 s. Not to be called in the loop itself."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return False
        turn: concurrent.futures.Future[None] = concurrent.futures.Future()
        try:
            loop.call_soon_threadsafe(turn.set_result, None)
            turn.result(_ANSWER_S)
        except (RuntimeError, TimeoutError):
            # Closed meanwhile, or stuck.
            return False
        return True


# Of this process, as prometheus-client's registry is.
HEALTH = ProcessHealth()
