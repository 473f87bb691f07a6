"""One scoring process: loads the job's verifier and scores line by line, until its input ends.

Started by the pool as `python -m longshore.verifier.worker MEMORY_BYTES PARENT_PID`, in an empty folder of its own.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, BinaryIO

from longshore.errors import LongshoreError, PluginError
from longshore.tasks import registry
from longshore.tasks.verification import Verifier
from longshore.verifier import lines
from longshore.verifier.confine import confine

MAX_ERROR_CHARACTERS = 1000


def main(arguments: list[str]) -> int:
    """Serves until end of input; the pool ends it by force when a score takes too long."""
    confine(memory_bytes=int(arguments[0]), parent=int(arguments[1]))
    incoming, outgoing = _take_over_pipes()
    verifier, name = None, ""
    for line in incoming:
        message = json.loads(line)
        try:
            if verifier is None:
                verifier, name = _load(message)
                answer: dict[str, Any] = {"verifier": name}
            else:
                verdict = verifier.score(lines.request_from_json(message))
                answer = {"verdict": lines.verdict_to_json(verdict)}
        except Exception as error:  # noqa: BLE001 - the request boundary: a scorer that raises has failed this score only
            answer = _failure(error)
        outgoing.write(lines.dumps(answer))
        outgoing.flush()
    return 0


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Moves the pool's pipes away from 0 and 1, so that a verifier that prints or reads harms nothing."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)
    return incoming, outgoing


def _load(message: dict[str, Any]) -> tuple[Verifier, str]:
    kind = registry.load(registry.VERIFIERS, message["name"])
    try:
        verifier: Verifier = kind(message["options"])
        return verifier, f"{message['name']}@{verifier.version}"
    except LongshoreError:
        raise
    except Exception as error:
        # A plug-in's constructor may raise anything.
        raise PluginError(f"verifier {message['name']!r} cannot be made with its options: {error!r}") from error


def _failure(error: Exception) -> dict[str, Any]:
    text = str(error) if isinstance(error, LongshoreError) else f"{type(error).__name__}: {error}"
    return {"error": text[:MAX_ERROR_CHARACTERS], "kind": type(error).__name__}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
