"""The rollouts of kept groups on disk, one file a group, written once under a name that is never used again.

{"prompt": [8, 9], "members": [[0, 311], [1, 298]]}\n   prompt's token ids; ticket index and bytes of each rollout
rollout rollout ...                                     serialised as they travel, the prompt left out
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from longshore.errors import IntegrityError, Rejected
from longshore.learner.disk import sync
from longshore.learner.groups import as_int, as_list, as_mapping
from longshore.rpc.convert_rollout import rollout_from_bytes, rollout_to_bytes
from longshore.rpc.convert_segment import leading_given
from longshore.rpc.token_columns import prompt_digest
from longshore.types import Rollout


def packed(rollouts: Sequence[Rollout]) -> bytes:
    """The file of a group's rollouts. Reading it gives rollouts that come to the same bits in training: log-probs are
    rounded as they were on their way here."""
    prompt = leading_given(rollouts[0].segments)
    digest = prompt_digest(prompt) if prompt else b""
    payloads = [rollout_to_bytes(rollout, digest) for rollout in rollouts]
    members = [[rollout.ref.index, len(payload)] for rollout, payload in zip(rollouts, payloads, strict=True)]
    header = json.dumps({"prompt": list(prompt), "members": members}, separators=(",", ":"))
    return b"".join([header.encode(), b"\n", *payloads])


def unpacked(data: bytes, sha256: str) -> list[Rollout]:
    """The rollouts of a file. Raises IntegrityError: these are not the bytes that were written."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise IntegrityError("the file does not match its checksum")
    header, _, body = data.partition(b"\n")
    told = as_mapping(json.loads(header))
    prompt = [as_int(token) for token in as_list(told["prompt"])]
    rollouts, start = [], 0
    for _, size in map(as_list, as_list(told["members"])):
        end = start + as_int(size)
        try:
            rollouts.append(rollout_from_bytes(body[start:end], lambda: prompt))
        except Rejected as error:
            # Whole, and yet not to be read: another release wrote it.
            raise IntegrityError(f"a rollout in it cannot be read: {error.detail}") from None
        start = end
    return rollouts


class GroupFiles:
    """A folder of such files. Nothing but these methods changes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file whole or not at all; it is durable after `sync`. Raises OSError."""
        part = self._folder / f".{name}.part"
        try:
            part.write_bytes(data)
            part.rename(self._folder / name)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise

    def read(self, name: str, sha256: str) -> list[Rollout]:
        """The rollouts of a file. Raises IntegrityError: it is gone or damaged."""
        try:
            return unpacked((self._folder / name).read_bytes(), sha256)
        except OSError as error:
            raise IntegrityError(f"{name} cannot be read: {error.strerror}") from None

    def sync(self, names: Iterable[str]) -> None:
        """Returns when these files, as far as they are still there, are durable, and so are their names."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sync(self._folder / name)
        sync(self._folder)

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, if they are there."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def keep_only(self, names: Iterable[str]) -> set[str]:
        """Removes every other file, and returns those of the names that are not there."""
        wanted = set(names)
        found = {path.name for path in self._folder.iterdir()}
        self.remove(found - wanted)
        return wanted - found
