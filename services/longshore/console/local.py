"""`run`, `up` and `down`: a stack on this machine, and nothing left of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import structlog

from longshore.client import ApiClient
from longshore.config import load_job
from longshore.console.follow import EXIT_OK, follow_job
from longshore.console.interrupt import Interrupt
from longshore.console.progress import Status
from longshore.console.screen import Screen
from longshore.console.summary import shown
from longshore.errors import LongshoreError, Unavailable
from longshore.launcher.stack import START_TIMEOUT_S, Stack, StackFailed
from longshore.launcher.state_dir import default_runs_dir, default_state_dir, holder, read_up
from longshore.telemetry.log import unfailing

_CANCEL_TIMEOUT_S = 2.0
# A stack gives its processes 8 s to drain, job by job and service by service.
_DOWN_TIMEOUT_S = 60.0
_POLL_S = 0.1


def load_checked(path: Path, seed: int | None) -> dict[str, Any]:
    """The job file's document, once nothing is wrong with it. Raises InvalidJobSpec with every fault."""
    from longshore.tasks.check import check_document

    document = load_with_seed(path, seed)
    check_document(document)
    return document


def load_with_seed(path: Path, seed: int | None) -> dict[str, Any]:
    """The job file's document with another seed. Raises InvalidJobSpec when the file cannot be read."""
    document = load_job(path)
    return document if seed is None else {**document, "seed": seed}


async def run(job_file: Path, document: dict[str, Any], screen: Screen, interrupt: Interrupt) -> int:
    """Starts a stack, runs one job on it, shows it, stops everything. Returns the exit code."""
    screen.status(Status("starting broker, weights and gateway"))
    # Jobs that an earlier stack left unfinished wait for the next `longshore up`.
    stack = _stack(screen, 0, jobs_since=time.time())
    _on_signals(interrupt, stack, screen)
    try:
        async with stack, ApiClient(stack.url, stack.api_key) as client:
            code = await _unless_failed(stack, _submit_and_follow(client, document, screen, str(job_file)))
            screen.status(Status("stopping the stack"))
            return code
    except asyncio.CancelledError:
        screen.line("everything is stopped")
        raise
    finally:
        screen.close()


async def up(port: int, screen: Screen, interrupt: Interrupt) -> int:
    """Starts a stack and keeps it until a signal comes. SIGTERM (`longshore down`) is an end in order."""
    screen.status(Status("starting broker, weights and gateway"))
    stack = _stack(screen, port)
    _on_signals(interrupt, stack, screen)
    try:
        async with stack:
            screen.close()
            _say_up(stack.url, stack.state_dir, screen)
            raise StackFailed(await stack.failure())
    except asyncio.CancelledError:
        screen.line("everything is stopped")
        if interrupt.signal != signal.SIGTERM:
            raise
        return EXIT_OK
    finally:
        screen.close()


async def up_detached(port: int, screen: Screen) -> int:
    """Starts `longshore up` in the background and returns once it is up. Raises LongshoreError when it is not."""
    state_dir = default_state_dir()
    logs = state_dir / "logs"
    await asyncio.to_thread(logs.mkdir, mode=0o700, parents=True, exist_ok=True)
    log = logs / "up.log"
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: ASYNC220 - it outlives this loop
            [sys.executable, "-m", "longshore", "up", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        screen.status(Status("starting the stack"))
        url = await _detached_url(process, state_dir, log)
    except BaseException:
        process.terminate()
        raise
    finally:
        screen.close()
    _say_up(url, state_dir, screen)
    return EXIT_OK


async def down(screen: Screen) -> int:
    """Stops the stack of this directory, whoever started it. Raises Unavailable when it does not end."""
    state_dir = default_state_dir()
    pid = holder(state_dir)
    if pid is None:
        screen.line("no stack is running here")
        return EXIT_OK
    screen.status(Status("stopping the stack"))
    deadline = time.monotonic() + _DOWN_TIMEOUT_S
    try:
        # The lock is held by this process, so the pid is that of no stranger.
        os.kill(pid, signal.SIGTERM)
        while holder(state_dir) == pid:
            if time.monotonic() > deadline:
                raise Unavailable(f"the stack (process {pid}) did not end within {_DOWN_TIMEOUT_S:.0f} s")
            await asyncio.sleep(_POLL_S)
    except ProcessLookupError:
        pass
    finally:
        screen.close()
    screen.line("the stack is down; unfinished jobs go on with the next `longshore up`")
    return EXIT_OK


async def _submit_and_follow(client: ApiClient, document: dict[str, Any], screen: Screen, job_file: str) -> int:
    job = await client.submit(document)
    folder = shown(Path(job["run_dir"]))
    screen.line(f"job {job['id']}: everything it writes is in {folder}")
    screen.line(f"agents can ask it by OpenAI's API: {folder}/openai.key and openai-*.url (docs/openai.md)")
    try:
        return await follow_job(client, job["id"], screen, job_file)
    except asyncio.CancelledError:
        # So that the next stack does not take the job up again.
        with contextlib.suppress(LongshoreError, TimeoutError):
            await asyncio.wait_for(client.cancel(job["id"]), _CANCEL_TIMEOUT_S)
        raise


async def _unless_failed(stack: Stack, work: Coroutine[Any, Any, int]) -> int:
    """The result of `work`. Raises StackFailed as soon as a shared service is given up."""
    task, failure = asyncio.create_task(work), asyncio.create_task(stack.failure())
    try:
        await asyncio.wait({task, failure}, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            raise StackFailed(failure.result())
        return task.result()
    finally:
        task.cancel()
        failure.cancel()
        await asyncio.gather(task, failure, return_exceptions=True)


def _stack(screen: Screen, port: int, jobs_since: float = 0.0) -> Stack:
    state_dir = default_state_dir()
    _log_to(state_dir / "logs" / "supervisor.log")

    def on_ready(name: str) -> None:
        screen.line(f"{name} is ready")

    return Stack(state_dir, default_runs_dir(), port, jobs_since, on_ready)


def _on_signals(interrupt: Interrupt, stack: Stack, screen: Screen) -> None:
    def on_first() -> None:
        screen.status(Status("stopping everything (Ctrl-C again: at once)"))

    interrupt.on_first, interrupt.on_hurry = on_first, stack.hurry


def _say_up(url: str, state_dir: Path, screen: Screen) -> None:
    key = shown(state_dir / "api.key")
    screen.line(f"the stack is up at {url}")
    screen.line(f'try  curl -H "Authorization: Bearer $(cat {key})" {url}/v1/jobs')
    screen.line("or   longshore submit JOB.yaml      and to stop it  longshore down")


def _log_to(path: Path) -> None:
    """The supervisor's own log goes to a file: the screen is for people."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        # Line-buffered and open until the process ends.
        logger_factory=structlog.PrintLoggerFactory(unfailing(path.open("a", buffering=1, encoding="utf-8"))),
    )


async def _detached_url(process: subprocess.Popen[bytes], state_dir: Path, log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S + 10.0
    while time.monotonic() < deadline:
        found = read_up(state_dir)
        if found is not None and found.pid == process.pid:
            return found.url
        if process.poll() is not None:
            said = await asyncio.to_thread(log.read_text, "utf-8", "replace")
            lines = [line.removeprefix("longshore: ") for line in said.splitlines() if line.startswith("longshore: ")]
            raise StackFailed("; ".join(lines) or f"the stack ended with {process.returncode}; its log: {log}")
        await asyncio.sleep(_POLL_S)
    raise StackFailed(f"the stack was not up in time; its log: {log}")
