"""A private broker for a benchmark: the server and the options of the embedded default, on a fresh folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from longshore.launcher.broker_server import own_broker

START_S = 20.0


class PrivateBroker:
    """A running broker, appending to its file with fsync each second; removed with its data at the end.

    `url` is its Unix socket; with `address` it also listens on TCP, at `tcp_url`. `prefix` goes before its command
    (to start it in a network namespace, say); `options` follow its own, and win.
    """

    def __init__(self, address: str = "", *, prefix: Sequence[str] = (), options: Sequence[str] = ()) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="ls-bench-")
        self.folder = Path(self._home.name)
        command = own_broker(self.folder / "data", self.folder / "broker.sock")
        self.url = command.url
        self.port = _free_port() if address else 0
        self.tcp_url = f"redis://{address}:{self.port}/0" if address else ""
        listen = ("--port", str(self.port), "--bind", address, "--protected-mode", "no") if address else ()
        self._argv = [*prefix, *command.argv, *listen, *options]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateBroker:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._home.cleanup()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it accepts connections. Raises RuntimeError, with its log, when it does not start."""
        (self.folder / "broker.sock").unlink(missing_ok=True)
        log = self.folder / "broker.log"
        with log.open("ab") as sink:
            self._process = subprocess.Popen(self._argv, stdout=sink, stderr=sink)
        deadline = time.monotonic() + START_S
        while not self._accepts():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the broker did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed. `start` brings it back with what its file holds."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def processor_s(self) -> float:
        """Seconds of processor time that the server has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.folder / "broker.sock")) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
