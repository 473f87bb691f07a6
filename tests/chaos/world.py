"""The machines under test, as a person would start them, seen from outside: processes, the REST API, the broker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from chaos.schedule import SUPERVISOR
from longshore.client import ApiClient, connect
from longshore.errors import LongshoreError, Unavailable
from longshore.launcher.client import SupervisorClient
from longshore.launcher.spec import ProcessState, ProcessStatus, UnitState, UnitStatus

START_S = 120.0
STOP_S = 40.0
PAUSE_S = 0.1


class Machine:
    """A supervisor that was started as a process of its own, and what it says of the processes under it."""

    def __init__(self, name: str, log: Path) -> None:
        """`name`: what the schedule calls it when all of it is killed at once."""
        self.name = name
        self.units: dict[str, UnitStatus] = {}
        # Grows whenever all of it was killed.
        self.lives = 0
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when it is up. Raises Unavailable when it does not come up."""
        raise NotImplementedError

    async def kill(self) -> None:
        """SIGKILL to the supervisor, which takes everything with it; then all of it is started again."""
        assert self._process is not None
        self.lives += 1
        pids = [process.pid for unit in self.units.values() for process in unit.processes if process.pid]
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        deadline = time.monotonic() + 10.0
        while any(alive(pid) for pid in pids):
            if time.monotonic() > deadline:
                raise Unavailable("processes outlived their supervisor")
            await asyncio.sleep(PAUSE_S)
        self.units = {}
        await self.start()

    async def stop(self) -> None:
        """An end in order."""
        if self._watching is not None:
            self._watching.cancel()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                await asyncio.to_thread(self._process.wait, STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def process(self, name: str) -> ProcessStatus | None:
        """The process of this name; None when there is none."""
        for unit in self.units.values():
            for process in unit.processes:
                if process.name == name:
                    return process
        return None

    def failed(self) -> str:
        """Why a unit was given up; "" while all are well."""
        return next((unit.message for unit in self.units.values() if unit.state is UnitState.FAILED), "")

    def ready(self, name: str) -> bool:
        process = self.process(name)
        return process is not None and process.state is ProcessState.READY and process.pid > 0

    def _run(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(argv, env=dict(env), cwd=cwd, stdout=log, stderr=log)

    async def _up(self, process: subprocess.Popen[bytes], done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not done():
            if process.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"{self.name} did not start; see {self._log}")
            await asyncio.sleep(PAUSE_S)

    def _watch(self, socket: Path) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self._watching = asyncio.create_task(self._watch_for_ever(f"unix:{socket}"))

    async def _watch_for_ever(self, address: str) -> None:
        while True:
            client = SupervisorClient(address)
            try:
                async for units in client.watch():
                    self.units = units
            except LongshoreError:
                await asyncio.sleep(PAUSE_S)
            finally:
                with contextlib.suppress(Exception):
                    await client.close()


class World(Machine):
    """The home site: `longshore up` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        """`folder` must be short: Unix sockets lie in it."""
        super().__init__(SUPERVISOR, folder / "up.log")
        self.folder = folder
        self.runs = folder / "runs"
        self.state_dir = folder / "state"

    async def __aenter__(self) -> World:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        env = {**os.environ, "LONGSHORE_HOME": str(self.state_dir), "LONGSHORE_RUNS": str(self.runs)}
        env.pop("REDIS_URL", None)
        # What says that an earlier stack is up must not be taken for this one's word.
        announced = self.state_dir / "up.json"
        announced.unlink(missing_ok=True)
        self._process = self._run([sys.executable, "-m", "longshore", "up"], env, self.folder)
        await self._up(self._process, announced.exists)
        self._watch(self.state_dir / "sockets" / "supervisor.sock")

    def api(self) -> ApiClient:
        return connect(self.state_dir)

    @property
    def broker_folder(self) -> Path:
        return self.state_dir / "broker"

    @property
    def broker_socket(self) -> Path:
        return self.state_dir / "sockets" / "broker.sock"

    def weights_address(self) -> str:
        """host:port of the weight store; "" while nobody knows."""
        gateway = self.process("gateway")
        if gateway is None or not gateway.pid:
            return ""
        try:
            environment = Path(f"/proc/{gateway.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return ""
        found = (item for item in environment if item.startswith(b"LONGSHORE_WEIGHTS="))
        return next(found, b"=").decode().partition("=")[2]

    def store(self, project: str, job: str) -> Path:
        return self.state_dir / "weights" / project / job


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
