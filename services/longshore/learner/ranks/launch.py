"""Starts the processes of a learner that is more than one: those of torchrun, without its network.

torchrun's own runner of processes is used (torch.distributed.elastic.multiprocessing): one that dies ends all, and
SIGTERM reaches each. Its rendezvous is not: that listens on every interface of the machine, lets in whoever connects,
and unpickles what it is told. The ranks meet at a file in a folder that is this user's alone, and talk over loopback.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

from longshore.launcher import guard
from longshore.learner.ranks.environment import RENDEZVOUS

# Exit code of a process that cannot work with the settings that it was given (rpc/process.py).
WRONG_SETTINGS = 2
# Between SIGTERM and SIGKILL; a supervisor has less patience than this.
GRACE_S = 30


def launch(processes: int) -> int:
    """Runs this very command once a rank, until all have ended well or one has not. Returns the exit code: that of the
    rank which failed first; where a signal ended that one, this process ends by the same."""
    # What a rank says of itself is what people look for at a log's end.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="longshore-ranks-") as folder:
        context = start_processes(
            name="learner",
            entrypoint=sys.executable,
            args=dict.fromkeys(range(processes), _command()),
            envs={rank: _environment(rank, processes, Path(folder)) for rank in range(processes)},
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            result = context.wait()
        except SignalException as told:
            context.close(told.sigval, timeout=GRACE_S)
            return 1
    codes = {rank: failure.exitcode for rank, failure in result.failures.items()} if result is not None else {}
    if WRONG_SETTINGS in codes.values():
        # The others have failed because that one had.
        return WRONG_SETTINGS
    rank, code = next(iter(codes.items()), (0, 0))
    if code < 0:
        print(f"longshore learner: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)  # noqa: T201
        _end_by(signal.Signals(-code))
    return code


def _end_by(number: signal.Signals) -> None:
    with contextlib.suppress(OSError):
        # SIGKILL cannot be handled, and needs not be.
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _command() -> tuple[str, ...]:
    # Where this process is killed, its ranks end too.
    return ("-I", "-S", guard.__file__, str(os.getpid()), "--", sys.executable, "-m", "longshore", "serve", "learner")


def _environment(rank: int, processes: int, folder: Path) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        RENDEZVOUS: (folder / "ranks").as_uri(),
    }
