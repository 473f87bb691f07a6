"""How a process knows that it is one of several of its learner: by torchrun's variables. Imports nothing heavy."""

from __future__ import annotations

import os

# Where the ranks find each other; without it, at the address that torchrun says.
RENDEZVOUS = "LONGSHORE_RENDEZVOUS"


def started_as_rank() -> bool:
    """Whether torchrun, or `launch.py`, has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's number; 0 leads."""
    return int(os.environ["RANK"])
