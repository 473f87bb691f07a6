"""When a reply is late: not because it is long, but because the generator that draws it is slow. Pure.

What is measured is the generator, never the reply: how long its first tokens take, and how many seconds a token takes
over a window of time. A reply is late at one generator if it goes `_FACTOR` times slower than the 95th percentile of
what another one, which would take it over, has shown lately. A site whose generators are all slow has no stragglers.

Whatever is decided here cannot bias what is drawn, because a late reply is neither raced nor drawn anew: it is *moved*.
The tokens that came are kept and another generator goes on after them, so that every token of the finished reply is a
draw from the policy given the tokens before it, whoever drew it and whatever made us ask (docs/many-generators.md,
has the argument and its one exception).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

# Fewer than these tell too little of a generator.
_MIN_SAMPLES = 32
_KEPT = 256
_PERCENTILE = 0.95
_FACTOR = 3.0
# The shortest window, and the least that a first token may take, in seconds: several of the generator's own flushes.
_WINDOW_S = 2.0
# A window holds this many tokens at the pace that it is compared with.
_WINDOW_TOKENS = 20
# Fewer tokens of a reply's last, shorter window say nothing of the pace.
_LEAST_TOKENS = 8
# Of all tokens, given and sampled, that moves may cost: a moved reply's prefix is computed a second time.
_BUDGET = 0.05
_MOST_SAVED = 1_000_000.0


class Paces:
    """What one generator has shown lately."""

    def __init__(self) -> None:
        self._firsts: deque[float] = deque(maxlen=_KEPT)
        self._seconds_per_token: deque[float] = deque(maxlen=_KEPT)
        self._longest_prompt = 1

    def first(self, seconds: float, prompt_tokens: int) -> None:
        self._firsts.append(seconds)
        self._longest_prompt = max(self._longest_prompt, prompt_tokens)

    def window(self, seconds: float, tokens: int) -> None:
        self._seconds_per_token.append(seconds / max(tokens, 0.5))

    def late_first(self, prompt_tokens: int) -> float | None:
        """Seconds after which a reply's first tokens are late; None: it cannot be said."""
        slow = _percentile(self._firsts)
        # A prompt longer than any that was seen may take as much longer.
        return None if slow is None else max(_WINDOW_S, _FACTOR * slow) * max(1.0, prompt_tokens / self._longest_prompt)

    def late_pace(self) -> float | None:
        """Seconds a token that are too many; None: it cannot be said."""
        slow = _percentile(self._seconds_per_token)
        return None if slow is None else _FACTOR * slow


class Progress:
    """One request at one generator: when its tokens came."""

    def __init__(self, paces: Paces, prompt_tokens: int, clock: Callable[[], float]) -> None:
        self._paces = paces
        self._prompt_tokens = prompt_tokens
        self._clock = clock
        # Start of the present window: at first the request's own.
        self._since = clock()
        self._tokens = 0
        self._begun = False
        # Seconds a token in the window before the present one.
        self._last = 0.0

    def drew(self, tokens: int) -> None:
        now = self._clock()
        if not self._begun:
            # These came together, however long ago the first of them was drawn.
            self._begun = True
            self._paces.first(now - self._since, self._prompt_tokens)
            self._since = now
            return
        self._tokens += tokens
        if now - self._since >= _WINDOW_S:
            self._close(now)

    def ended(self) -> None:
        if self._tokens >= _LEAST_TOKENS:
            self._close(self._clock())

    def is_late(self, elsewhere: Paces) -> bool:
        """Whether the generator with those paces would by far have been faster."""
        waited = self._clock() - self._since
        if not self._begun:
            late = elsewhere.late_first(self._prompt_tokens)
            return late is not None and waited > late
        pace = elsewhere.late_pace()
        if pace is None:
            return False
        if self._last > pace:
            return True
        # So long that at the other's own pace a good many tokens would have come.
        return waited >= max(_WINDOW_S, _WINDOW_TOKENS * pace / _FACTOR) and waited > pace * self._tokens

    def _close(self, now: float) -> None:
        self._last = (now - self._since) / max(self._tokens, 0.5)
        self._paces.window(now - self._since, self._tokens)
        self._since, self._tokens = now, 0


class Budget:
    """Tokens that moves may cost: a fixed share of those that replies were made of."""

    def __init__(self) -> None:
        self._saved = 0.0

    def earned(self, tokens: int) -> None:
        self._saved = min(_MOST_SAVED, self._saved + _BUDGET * tokens)

    def spend(self, tokens: int) -> bool:
        """Whether there was enough."""
        if tokens > self._saved:
            return False
        self._saved -= tokens
        return True


def _percentile(samples: deque[float]) -> float | None:
    if len(samples) < _MIN_SAMPLES:
        return None
    return sorted(samples)[int(_PERCENTILE * len(samples))]
