"""What signals do to a command that stays: in a process of its own, as its signals are a process's."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, os, signal, sys
from longshore.console.interrupt import run_interruptible
first, number = (getattr(signal, name) for name in sys.argv[1:])
signal.signal(number, first)
async def work(interrupt):
    interrupt.on_first = lambda: print("first")
    os.kill(os.getpid(), number)
    try:
        # The signal comes in a turn of the loop.
        await asyncio.sleep(0.2)
    except asyncio.CancelledError:
        print("cleaned up")
        raise
    return 0
sys.exit(run_interruptible(work))
"""


@pytest.mark.parametrize(
    ("before", "number", "code", "said"),
    [
        ("SIG_DFL", "SIGINT", 130, ["first", "cleaned up"]),
        ("SIG_DFL", "SIGTERM", 143, ["first", "cleaned up"]),
        ("SIG_DFL", "SIGHUP", 129, ["first", "cleaned up"]),
        # Shells start what is in the background so; `kill -INT` is an order all the same.
        ("SIG_IGN", "SIGINT", 130, ["first", "cleaned up"]),
        # nohup.
        ("SIG_IGN", "SIGHUP", 0, []),
    ],
)
def test_a_signal_ends_the_work_in_order(before: str, number: str, code: int, said: list[str]) -> None:
    argv = [sys.executable, "-c", SCRIPT, before, number]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (code, said, "")
