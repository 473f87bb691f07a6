"""Jobs are checked in processes of their own, which a plug-in may bring down or fill up in the gateway's place."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

from longshore.config import JobSpec
from longshore.errors import Fault, Unavailable
from longshore.tasks.check import check_document

_GIVES_UP_S = 2.0


class CheckProcesses:
    """As many processes as there are callers at a time; each is started when it is first needed, and used again.

    Its methods block, and may be called from any thread.
    """

    def __init__(self, memory_mb: int, timeout_s: float) -> None:
        """
        Args:
            memory_mb: what each may hold, in MiB.
            timeout_s: for one job.
        """
        self._memory_mb = memory_mb
        self._timeout_s = timeout_s
        self._idle: list[_Process] = []
        self._lock = threading.Lock()
        self._closed = False

    def check_document(self, document: object) -> JobSpec:
        """Parses a job's document and checks it against what is installed here.

        Raises:
            InvalidJobSpec: with every fault, those of the document and those of the world in one list.
            Unavailable: the check did not end in time.
        """
        return check_document(document, self._check)

    def close(self) -> None:
        """Ends the processes; those at work, when their work is done."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    def _check(self, spec: JobSpec) -> list[Fault]:
        process = self._idle_one() or _Process(self._memory_mb, self._timeout_s)
        try:
            answer = process.ask(spec.model_dump_json(), self._timeout_s)
        except TimeoutError:
            process.end()
            raise Unavailable(f"the job could not be checked within {self._timeout_s:.0f} s") from None
        except OSError:
            return [Fault("(document)", spec.name, self._death(process.end()))]
        with self._lock:
            keep = not self._closed
            if keep:
                self._idle.append(process)
        if not keep:
            process.end()
        return [Fault(**fault) for fault in json.loads(answer)]

    def _idle_one(self) -> _Process | None:
        """One that waits; those that have died while they did are nobody's fault."""
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.alive:
                    return process
                process.end()
        return None

    def _death(self, code: int) -> str:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return (
            f"ended the process that checked it ({how}): a plug-in is broken, or needs more for these options than the "
            f"{self._memory_mb} MB of LONGSHORE_CHECK_MEMORY_MB"
        )


class _Process:
    """One of longshore.tasks.check_process."""

    def __init__(self, memory_mb: int, timeout_s: float) -> None:
        self._link, theirs = socket.socketpair()
        numbers = (theirs.fileno(), memory_mb, int(timeout_s) + 1)
        argv = [sys.executable, "-m", "longshore.tasks.check_process", *(str(number) for number in numbers)]
        # numpy's threads would each take memory of their own.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                argv, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: str, timeout_s: float) -> bytes:
        """Raises TimeoutError, ConnectionError: it has died."""
        deadline = time.monotonic() + timeout_s
        self._link.settimeout(timeout_s)
        self._link.sendall(line.encode() + b"\n")
        answer = bytearray()
        while not answer.endswith(b"\n"):
            self._link.settimeout(max(0.001, deadline - time.monotonic()))
            part = self._link.recv(1 << 16)
            if not part:
                raise ConnectionResetError
            answer += part
        return bytes(answer)

    def end(self) -> int:
        """Its exit code, negative for a signal. One that has no work ends by itself once its link has gone."""
        self._link.close()
        try:
            return self._process.wait(_GIVES_UP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
