"""How much one key, and all of them together, may have going on at a time."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator

from longshore.generator.openai_http.faults import too_many


class Places:
    """Replies that each key may have in the works."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def taken(self, name: str, number: int) -> Iterator[None]:
        """Holds places during the block. Raises ApiError 429 where there are not so many."""
        if self._taken[name] + number > self._most:
            raise too_many(
                f"{number} more replies are too many: the key {name!r} has {self._taken[name]} in the works, "
                f"at most {self._most} are let in"
            )
        self._taken[name] += number
        try:
            yield
        finally:
            self._taken[name] -= number
            if not self._taken[name]:
                del self._taken[name]


class Bytes:
    """Memory for requests' bodies, of all callers together."""

    def __init__(self, most: int) -> None:
        self._left = most

    @contextlib.contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Holds room during the block. Raises ApiError 429 where there is not so much."""
        if number > self._left:
            raise too_many("the bodies of other requests fill the memory that there is for them")
        self._left -= number
        try:
            yield
        finally:
            self._left += number
