"""Which pages of the cache are in use, and what those hold that were computed already.

Pure bookkeeping over page numbers; knows neither tensors nor requests. A page is *held* by each sequence that has it in
its table, several where they begin alike. What a page holds stays good after its last holder has let go, until the page
is needed for something else, the one unused longest first: so a group's prompt is computed once, and a conversation's
next turn begins where the one before ended.

The index is a tree: a page's key is the page before it, or the *root*, a negative number that stands for the weights
that computed it, and the tokens that it holds. Only a full page is shared; of one that a sequence still writes to, or
whose tokens differ from some place on, the beginning is copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

# Tokens of a page; as attention/kernel.c has it.
PAGE = 16
# Pages with the same one before them that are looked through for a beginning to copy.
LOOKED_AT = 16


@dataclass(frozen=True)
class Found:
    """What there is of a context: whole pages, now held for the caller, and the beginning of the next one."""

    pages: list[int]
    # A page that is held too, until it has been copied; -1: none. And how many of its tokens are good.
    source: int = -1
    tokens: int = 0

    @property
    def length(self) -> int:
        return len(self.pages) * PAGE + self.tokens


class Pages:
    """`count` pages, numbered from 0."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        # Pages that nobody holds and that still hold something good, the one unused longest first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        # Of pages in the index: the one before, and the tokens.
        self._nodes: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._after: dict[int, dict[int, None]] = {}
        self._full: dict[tuple[int, tuple[int, ...]], int] = {}

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.count - self.available

    def find(self, root: int, context: Sequence[int]) -> Found:
        """The longest beginning of a context that was computed under a root."""
        before, pages = root, []
        for start in range(0, len(context) - PAGE + 1, PAGE):
            page = self._full.get((before, tuple(context[start : start + PAGE])))
            if page is None:
                break
            pages.append(page)
            before = page
        source, most = -1, 0
        rest = context[len(pages) * PAGE :]
        for page in islice(reversed(self._after.get(before, {})), LOOKED_AT):
            good = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._nodes[page][1], rest)))  # noqa: B905 - the shorter one ends it
            if good > most:
                source, most = page, good
        self.hold(pages if source < 0 else [*pages, source])
        return Found(pages, source, most)

    def hold(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def take(self, count: int) -> list[int]:
        """Pages that hold nothing, held for the caller; there must be as many available."""
        assert count <= self.available
        while len(self._free) < count:
            self._forget(next(iter(self._idle)))
        taken = [self._free.pop() for _ in range(count)]
        self.hold(taken)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Lets a sequence's pages go, in their order; or the last ones of it."""
        # The last one first: so no page is given away before one that comes after it.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._nodes:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def publish(self, before: int, page: int, tokens: tuple[int, ...]) -> int:
        """Says what a held page holds from now on, after the page before it (or a root).

        Returns the page itself; or another one that holds the same already, now held in its place.
        """
        if before >= 0 and before not in self._nodes:
            # Nobody could find it.
            return page
        known = self._full.get((before, tokens))
        if known is not None and known != page:
            self.hold([known])
            self._withdraw(page)
            self.release([page])
            return known
        self._nodes[page] = (before, tokens)
        self._after.setdefault(before, {})[page] = None
        if len(tokens) == PAGE:
            self._full[before, tokens] = page
        return page

    def _withdraw(self, page: int) -> None:
        """Takes a page out of the index."""
        node = self._nodes.pop(page, None)
        if node is None:
            return
        before, tokens = node
        if self._full.get(node) == page:
            del self._full[before, tokens]
        siblings = self._after[before]
        del siblings[page]
        if not siblings:
            del self._after[before]

    def _forget(self, page: int) -> None:
        """Makes an idle page a free one, and with it those after it: whoever holds one of them holds this one too."""
        for after in list(self._after.get(page, {})):
            self._forget(after)
        self._withdraw(page)
        del self._idle[page]
        self._free.append(page)
