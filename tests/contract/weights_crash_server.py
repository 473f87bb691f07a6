"""The weights process, which kills itself before the n-th write or read once a file says so.

Arguments: the file's path; it holds "write 3", "read 1", or "background 2" for the writes of the store's upkeep.
Without a second argument "upkeep" there is none, so that what is on the disk is what publishes wrote. Started by the
tests of crashes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longshore.weight_store.objects import Objects
from longshore.weight_store.upkeep import Upkeep
from longshore.weights.service import main

ORDER = Path(sys.argv[1])
KINDS = {"put": "write", "create": "write", "delete": "write", "read": "read"}
_count = {"write": 0, "read": 0, "background": 0}


def deadly(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if ORDER.exists():
            own = "background" if threading.current_thread().name == "upkeep" and kind == "write" else kind
            _count[own] += 1
            if ORDER.read_text() == f"{own} {_count[own]}":
                os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments)

    return call


if sys.argv[2:] != ["upkeep"]:
    Upkeep.work = lambda *_: None  # type: ignore[method-assign]

for name, kind in KINDS.items():
    setattr(Objects, name, deadly(kind, getattr(Objects, name)))
sys.exit(main())
