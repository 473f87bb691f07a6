"""One supervised process over all its lives: start, become ready, die, start again, give up, stop.

Knows nothing of units or of how readiness is asked for (`Probe`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from longshore.launcher import guard
from longshore.launcher.deaths import Deaths, Rules
from longshore.launcher.last_words import last_words
from longshore.launcher.spec import ProcessSpec, ProcessState, ProcessStatus, Ready

log = structlog.get_logger()

# Answers whether a process is ready; never raises, returns within a second or two.
Probe = Callable[[Ready], Awaitable[bool]]


class Child:
    """Keeps one process alive until it completes its unit, gives up, or is stopped."""

    def __init__(self, spec: ProcessSpec, probe: Probe, rules: Rules, hurry: asyncio.Event) -> None:
        self.spec = spec
        self.state = ProcessState.STARTING
        self.restarts = 0
        self.exit_code: int | None = None
        self.on_change: Callable[[], None] = lambda: None
        self._pid = 0
        self._probe = probe
        self._rules = rules
        self._hurry = hurry
        self._stop = asyncio.Event()

    @property
    def status(self) -> ProcessStatus:
        return ProcessStatus(
            self.spec.name, self.state, self._pid, self.restarts, self.exit_code, str(self.spec.log_path)
        )

    def stop(self) -> None:
        """Asks the process to end; `run` returns once it has."""
        self._stop.set()

    async def run(self) -> str | None:
        """Returns None when the process exited with 0 and completes its unit, or was stopped; otherwise, why it was
        given up."""
        deaths = Deaths()
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                became_ready = await self._live()
            except OSError as error:
                self._set(ProcessState.GAVE_UP)
                return f"{self.spec.name} cannot be started: {error}"
            if self._stop.is_set():
                break
            assert self.exit_code is not None
            if self.exit_code == 0 and self.spec.completes_unit:
                self._set(ProcessState.EXITED)
                return None
            deaths.count(became_ready, self.exit_code, time.monotonic() - began, self._rules)
            hopeless = deaths.hopeless(self._rules)
            if hopeless:
                self._set(ProcessState.GAVE_UP)
                return self._epitaph(hopeless)
            await self._back_off(deaths.short_lives)
        self._set(ProcessState.EXITED)
        return None

    def _epitaph(self, hopeless: str) -> str:
        words = last_words(self.spec.log_path)
        said = f"; it said last: {words}" if words else ""
        return f"{self.spec.name} died {hopeless} ({self._how()}){said}; its log: {self.spec.log_path}"

    def _how(self) -> str:
        assert self.exit_code is not None
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-self.exit_code).name
        return f"signal {-self.exit_code}"

    async def _back_off(self, deaths: int) -> None:
        delay = min(self._rules.max_backoff, self._rules.first_backoff * 2.0 ** (deaths - 1))
        log.warning("process died", process=self.spec.name, how=self._how(), restart_in_s=delay)
        self._set(ProcessState.BACKOFF)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), delay)
        if not self._stop.is_set():
            self.restarts += 1

    async def _live(self) -> bool:
        """One life, from start to death. Returns whether it became ready. Raises OSError if it cannot start."""
        process = await self._spawn()
        exited = asyncio.create_task(process.wait())
        stopped = asyncio.create_task(self._stop.wait())
        watching = asyncio.create_task(self._watch(process.pid))
        try:
            await asyncio.wait({exited, stopped}, return_when=asyncio.FIRST_COMPLETED)
            # A process that drains no longer says that it serves.
            watching.cancel()
            if not exited.done():
                await self._end(process, exited)
        finally:
            stopped.cancel()
            watching.cancel()
            # What the process itself started goes with it.
            _kill_group(process.pid)
        self._pid = 0
        self.exit_code = exited.result()
        return self.state is ProcessState.READY

    async def _spawn(self) -> Process:
        self._set(ProcessState.STARTING)
        self.spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        guarded = (sys.executable, "-I", "-S", str(Path(guard.__file__)), str(os.getpid()), "--", *self.spec.argv)
        with self.spec.log_path.open("ab") as log_file:
            # A session of its own: Ctrl-C at the terminal reaches the supervisor alone, which stops all in order.
            process = await asyncio.create_subprocess_exec(
                *guarded,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **self.spec.env},
                start_new_session=True,
            )
        self._pid = process.pid
        self.on_change()
        return process

    async def _watch(self, pid: int) -> None:
        """Sees a process become ready; kills it when it does not, or when it stops answering."""
        await self._await_ready(pid)
        silent = idle = 0
        used = cpu_seconds(pid)
        while self._pid == pid and idle < self._rules.max_silent_looks and silent < self._rules.max_busy_looks:
            await asyncio.sleep(self._rules.look_every)
            silent = 0 if await self._probe(self.spec.ready) else silent + 1
            before, used = used, cpu_seconds(pid)
            idle = idle + 1 if silent and used == before else 0
        if self._pid == pid:
            log.error("process does not answer", process=self.spec.name, looks=silent, idle=idle)
            self._explain(f"did not answer {silent} times in a row, and was killed for it")
            _kill_group(pid)

    async def _await_ready(self, pid: int) -> None:
        deadline = time.monotonic() + self._rules.start_timeout
        while not await self._probe(self.spec.ready):
            if time.monotonic() > deadline and self._pid == pid:
                log.error("process did not become ready", process=self.spec.name, after_s=self._rules.start_timeout)
                self._explain(f"was not ready after {self._rules.start_timeout:.0f} s, and was killed for it")
                _kill_group(pid)
            if self._pid != pid or time.monotonic() > deadline:
                return
            await asyncio.sleep(self._rules.probe_every)
        # The answer may have come from a life that is over.
        if self._pid == pid:
            self._set(ProcessState.READY)

    async def _end(self, process: Process, exited: asyncio.Task[int]) -> None:
        # The leader alone is asked, so that it can end its own helpers in order.
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        hurried = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({exited, hurried}, timeout=self._rules.grace, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not exited.done():
            if not self._hurry.is_set():
                log.warning("process did not end in time", process=self.spec.name, after_s=self._rules.grace)
            _kill_group(process.pid)
            await exited

    def _explain(self, text: str) -> None:
        """Says in the process's own log, where people look, what the process itself cannot say."""
        with contextlib.suppress(OSError), self.spec.log_path.open("a") as log_file:
            log_file.write(f"{self.spec.name} {text}\n")

    def _set(self, state: ProcessState) -> None:
        self.state = state
        self.on_change()


def cpu_seconds(pid: int) -> float | None:
    """Processor time that a process and those that it has started have used; None where that cannot be told, or when
    it has gone."""
    try:
        # The name in brackets may hold anything; user and system time are the 12th and 13th fields behind it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used + sum(cpu_seconds(child) or 0.0 for child in _children(pid))


def _children(pid: int) -> list[int]:
    """Pids of what a process has started and is still there; none where the kernel does not tell."""
    try:
        listed = [(thread / "children").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [int(child) for line in listed for child in line.split()]


def _kill_group(pid: int) -> None:
    # The group's number is the leader's pid, because the leader began a session.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
