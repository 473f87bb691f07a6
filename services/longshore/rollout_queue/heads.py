"""The words that go with a rollout's bytes on the broker: into deliver of functions.lua, and in the stream's entry.

One text each instead of a field for each word: every argument of a command costs both sides some time. Knows neither
what a payload holds nor how it travels.
"""

from __future__ import annotations

from typing import NamedTuple

_SCHEMA = "1"
_WORDS = 7
# More digits are no number that the broker has counted to.
_MAX_DIGITS = 18


class Head(NamedTuple):
    """What the `rollout` field of an entry says, in its order. Anybody may have written it: any word can be anything.

    Example: Head("1", "12.3", "1", "home", "0", "plain", "99aa06d3014798d86001c324468d497f", True)
    """

    schema: str
    key: str
    attempt: str
    site: str
    # "1" when the rollout awaits its verdict.
    awaiting: str
    codec: str
    digest: str
    # Whether it has the right number of words.
    is_whole: bool

    @property
    def is_known(self) -> bool:
        """Whether deliver of this release could have written it."""
        return self.is_whole and self.schema == _SCHEMA


def read(field: bytes) -> Head:
    """A field's words; those that it lacks are empty, so that as much as is there can be told."""
    words = field.decode(errors="replace").split(" ")
    is_whole = len(words) == _WORDS
    if not is_whole:
        words = (words + [""] * _WORDS)[:_WORDS]
    schema, key, attempt, site, awaiting, codec, digest = words
    return Head(schema, key, attempt, site, awaiting, codec, digest, is_whole)


def number(word: str) -> int:
    """A number's value; 0 for what is none."""
    return int(word) if word.isdecimal() and len(word) <= _MAX_DIGITS else 0


def to_deliver(fence: tuple[str, int, str], digest: str, codec: str, awaiting_verdict: bool) -> str:
    """The argument of deliver for a rollout of the attempt with this fence."""
    key, attempt, entry = fence
    return f"{key} {attempt} {entry} {digest} {codec} {1 if awaiting_verdict else 0}"
