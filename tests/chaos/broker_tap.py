"""Follows one broker's append-only file in a thread, and can make it lose its last second while the broker is down."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from chaos.aof import AofFile, cut
from chaos.shadow import BrokerShadow, Now

POLL_S = 0.1
# Places that the broker can be sent back to.
_KEPT_S = 30.0


@dataclass(frozen=True)
class _Mark:
    """What the broker held when its file had this length."""

    at: float
    path: Path
    position: int
    saved: dict[tuple[str, str], Now]


@dataclass(frozen=True)
class Loss:
    """What a broker lost: bytes of its file and the time that they stand for."""

    size: int
    seconds: float


class BrokerTap:
    """The test's own record of what a broker did."""

    def __init__(self, name: str, folder: Path) -> None:
        """`folder` is the server's data directory."""
        self.name = name
        self.shadow = BrokerShadow()
        self.losses: list[Loss] = []
        self.error = ""
        self._file = AofFile(folder / "appendonlydir")
        self._marks: deque[_Mark] = deque()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tap-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns once everything that the file holds has been taken in."""
        self._stop.set()
        self._thread.join()
        self.catch_up()
        self._file.close()

    def catch_up(self) -> None:
        """Takes in what has been written up to now."""
        with self._lock:
            self._read()

    def lose_tail(self, seconds: float) -> Loss | None:
        """Cuts the file of a broker that is down back to where it was so long ago; None when that is not known."""
        with self._lock:
            self._read()
            now = time.monotonic()
            path = self._file.path
            marks = [mark for mark in self._marks if mark.path == path and now - mark.at >= seconds]
            if path is None or not marks:
                return None
            mark = marks[-1]
            loss = Loss(self._file.size() - mark.position, now - mark.at)
            cut(path, mark.position)
            self._go_back(mark)
            self.losses.append(loss)
            return loss

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.catch_up()
            except ValueError as error:
                self.error = f"the file of broker {self.name} cannot be followed: {error}"
                return

    def _read(self) -> None:
        if self._file.size() < self._file.position:
            # The server dropped a torn end of its own accord.
            size, path = self._file.size(), self._file.path
            self._go_back(next(mark for mark in reversed(self._marks) if mark.path == path and mark.position <= size))
        path = self._file.path
        found = self._file.read()
        if found:
            assert self._file.path is not None
            if self._file.path != path:
                # Nothing of it is taken in yet: the broker is where it was at the old file's end.
                self._mark(self._file.path, 0)
            self.shadow.take(found, f"{self.name} {self._file.path.name}")
            self._mark(self._file.path, self._file.position)

    def _mark(self, path: Path, position: int) -> None:
        now = time.monotonic()
        self._marks.append(_Mark(now, path, position, self.shadow.save()))
        # The newest that are older stay: a quiet broker, too, can be sent back.
        while len(self._marks) > 2 and now - self._marks[0].at > _KEPT_S:
            self._marks.popleft()

    def _go_back(self, mark: _Mark) -> None:
        self.shadow.restore(mark.saved)
        self._file.rewind(mark.position)
        while self._marks[-1] is not mark:
            self._marks.pop()
