"""Starts a program that cannot outlive the supervisor: `guard.py PARENT_PID -- PROGRAM ARGUMENTS...`.

On Linux the kernel sends SIGKILL to the program when the supervisor's thread that started it ends, however that ends.
Elsewhere the program just starts. Run by its path with `-I -S`, so it costs milliseconds; imports nothing of ours.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Replaces this process by the program. Exits with 127 when there is no such program."""
    parent, separator, *command = argv
    assert separator == "--"
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The supervisor may have died before the line above, and then no signal comes.
        if os.getppid() != int(parent):
            sys.exit("the supervisor is gone")
    try:
        os.execvp(command[0], command)  # noqa: S606 - the argv that the launcher's plan made
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]}: {error.strerror}\n")
        sys.exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
