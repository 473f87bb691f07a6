"""The weights process, which kills itself before the n-th write or read once a file says so.

Arguments: the file's path; it holds "write 3" or "read 1". Started by test_weights_crash.py.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longshore.weight_store.objects import Objects
from longshore.weights.service import main

ORDER = Path(sys.argv[1])
KINDS = {"put": "write", "create": "write", "delete": "write", "read": "read"}
_count = {"write": 0, "read": 0}


def deadly(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if ORDER.exists():
            _count[kind] += 1
            if ORDER.read_text() == f"{kind} {_count[kind]}":
                os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments)

    return call


for name, kind in KINDS.items():
    setattr(Objects, name, deadly(kind, getattr(Objects, name)))
sys.exit(main())
