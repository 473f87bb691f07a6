"""A path to a version as a store told it, checked before any of its bytes is taken."""

from __future__ import annotations

from collections.abc import Sequence

from longshore.errors import Rejected
from longshore.proto.v1 import weights_pb2
from longshore.weight_store.decoding import check_encoding, max_encoding_bytes
from longshore.weight_store.payload import TensorInfo
from longshore.weight_store.planner import Step, path_bytes

# Most that a path may have, as a multiple of the version's own bytes: a store that has an anchor offers no path that is
# longer than it, and what is offered is held in memory.
MAX_PATH_TIMES = 8


def base_of(path: Sequence[Step]) -> int | None:
    """The version that a path starts from; None when it starts from nothing."""
    first = path[0].encoding
    return first.base_version if first.HasField("base_version") else None


def checked_path(told: Sequence[weights_pb2.PathStep], version: int, infos: Sequence[TensorInfo]) -> tuple[Step, ...]:
    """The path's steps. Raises Rejected: it cannot lead to the version."""
    path = tuple(Step(step.version, step.encoding) for step in told)
    if not path or path[-1].version != version:
        raise Rejected("path", f"the path does not end at version {version}")
    before: Step | None = None
    for step in path:
        check_encoding(step.encoding, step.version, infos)
        if before is not None and base_of([step]) != before.version:
            raise Rejected("path", f"the path breaks between versions {before.version} and {step.version}")
        before = step
    if path_bytes(path) > MAX_PATH_TIMES * max_encoding_bytes(infos):
        raise Rejected("path", f"{path_bytes(path)} bytes are no way to version {version}")
    return path
