"""The `longshore` command: runs what `console/app.py` parsed, and turns errors into one line and an exit code.

0 done, 1 failed, 2 wrong input, 128 + n ended by signal n. Imports next to nothing by itself: Ctrl-C while the rest is
imported is an end in order too.
"""

from __future__ import annotations

import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code; a person never sees a traceback of a foreseen error."""
    # gRPC's own notes are for its developers.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(argv: list[str]) -> int:
    from cyclopts import CycloptsError

    from longshore.console.app import app
    from longshore.errors import LongshoreError

    try:
        code = app(argv, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        sys.stderr.write(f"longshore: {' '.join(str(error).split())}\n")
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("longshore"):
            raise
        sys.stderr.write(f"longshore: this command needs {error.name}: pip install 'longshore[local]'\n")
        return 1
    except LongshoreError as error:
        return _say(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError) or argv[:1] == ["serve"]:
            # A service's log is for whoever wants to know where it happened.
            raise
        # The machine's word, not a bug: a folder that cannot be written, a full disk, a file where a folder belongs.
        where = f"{error.filename}: " if error.filename is not None else ""
        sys.stderr.write(f"longshore: {where}{error.strerror or error}\n")
        return 1
    return int(code or 0)


def _say(error: Exception) -> int:
    from longshore.errors import InvalidJobSpec

    if isinstance(error, InvalidJobSpec):
        for fault in error.faults:
            sys.stderr.write(f"longshore: {' '.join(str(fault).split())}\n")
        return 2
    sys.stderr.write(f"longshore: {error}\n")
    return 1
