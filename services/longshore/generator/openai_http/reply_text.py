"""A reply's tokens as text, while it grows: whole characters, and nothing beyond a stop string.

Pure logic over a function that decodes token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A byte that is no character, or not yet: what decoders show instead.
_NO_CHARACTER = "\ufffd"
# Bytes of a character that may lack its last one: each can show as one U+FFFD.
_UNFINISHED = 3
# Tokens that are decoded anew with each addition, once they have become twice as many. So long a row of bytes that are
# no characters is noise; a shorter one may be the beginning of characters, which some decoders show when all are there.
_WINDOW = 16


class GrowingText:
    """The text of token ids that come bit by bit; the pieces together are what decoding all of them gives."""

    def __init__(self, decode: Callable[[list[int]], str], hidden: frozenset[int]) -> None:
        """
        Args:
            decode: text of token ids, each of which it shows.
            hidden: tokens that are not shown.
        """
        self._decode = decode
        self._hidden = hidden
        # The last tokens: what comes before them does not change how they read.
        self._window: list[int] = []
        # Characters of the window's text that have been given out.
        self._given = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """What can be said of the text now; the bytes of an unfinished character wait for the rest of it."""
        shown = [token for token in token_ids if token not in self._hidden]
        if not shown:
            return ""
        self._window += shown
        text = self._decode(self._window)
        unsure = len(text) - len(text.rstrip(_NO_CHARACTER))
        is_long = len(self._window) > 2 * _WINDOW
        sure = text[: len(text) - (min(unsure, _UNFINISHED) if is_long else unsure)]
        new = sure[self._given :]
        self._given = max(self._given, len(sure))
        if is_long:
            # Counted from the end: a text that starts elsewhere may start differently.
            kept = len(text) - self._given
            self._window = self._window[-_WINDOW:]
            self._given = max(0, len(self._decode(self._window)) - kept)
        return new

    def end(self) -> str:
        """What waited for a rest that does not come."""
        rest = self._decode(self._window)[self._given :] if self._window else ""
        self._window, self._given = [], 0
        return rest


class StopStrings:
    """Cuts a growing text off before the first of some strings, wherever its pieces begin and end."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        # The end of the text so far, where a stop string may have begun.
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What of the text is certain to stay. Once `found`, nothing more is."""
        if self.found:
            return ""
        held = self._held + text
        places = [place for place in (held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        keep = self._begun(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """What was held in case a stop string had begun."""
        rest, self._held = self._held, ""
        return rest

    def _begun(self, text: str) -> int:
        """Length of the longest end of the text that is a stop string's beginning."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
