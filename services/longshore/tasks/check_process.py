"""Checks jobs in a process whose memory is bounded: `python -m longshore.tasks.check_process FD MB SECONDS`.

A job's options are a stranger's, and a plug-in makes of them what it likes: whoever asks for tasks of a billion terms
is not to take the gateway down. Over the socket FD come JobSpecs, a line of JSON each, and faults go back, a line each.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from dataclasses import asdict

from longshore.config import JobSpec
from longshore.tasks.check import check_job

_MIB = 1024 * 1024


def main(fd: int, memory_mb: int, seconds: int) -> None:
    """Answers until the other side has gone. A check that takes longer than `seconds` is the end of the process."""
    # What a plug-in prints is for the gateway's log.
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_mb * _MIB, memory_mb * _MIB))
    with socket.socket(fileno=fd) as link, link.makefile("rw", encoding="utf-8", newline="\n") as stream:
        for line in stream:
            # Nobody else may be there to end it.
            signal.alarm(seconds)
            faults = check_job(JobSpec.model_validate_json(line))
            signal.alarm(0)
            json.dump([asdict(fault) for fault in faults], stream, default=str)
            stream.write("\n")
            stream.flush()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
