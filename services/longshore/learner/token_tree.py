"""Where the tokens of several sequences stand in one pack: what they begin with alike stands there once.

A pack is a prefix tree written out depth first. A node is a run of tokens that belong together; everything that grew
from it follows it directly, so its subtree is one range of places. A token attends to its own node up to itself and to
the nodes above: place i sees place j exactly where  j <= i < subtree_end[j].

    sequences  a b c d    a b c e f          places  0 1 2 3 4 5
                                             tokens  a b c d e f     positions  0 1 2 3 3 4
                                             nodes   a b c | d | e f
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# A shorter common run isn't worth a node of its own: it is computed again for each sequence.
MIN_SHARED = 16


@dataclass(frozen=True)
class Node:
    """A run of tokens: places `start` to `start + length`; what grew from it ends at place `end`."""

    start: int
    length: int
    end: int

    @property
    def stop(self) -> int:
        """The place behind its last token."""
        return self.start + self.length


@dataclass(frozen=True)
class TokenTree:
    """Sequences laid out as one row of T places."""

    # [T] each: token ids; position ids, which count from the sequence's beginning.
    token_ids: Ints
    positions: Ints
    nodes: tuple[Node, ...]
    # Indices into the sequences given, in the order in which they were laid; and for each, [L] the place of each token.
    members: tuple[int, ...]
    places: tuple[Ints, ...]

    @property
    def size(self) -> int:
        """Its places, T."""
        return int(self.token_ids.size)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.positions.max()) + 1

    def subtree_ends(self, size: int) -> Ints:
        """[size] the end of each place's subtree; a place behind the tree sees and is seen by itself alone."""
        ends = np.arange(1, size + 1, dtype=np.int64)
        for node in self.nodes:
            ends[node.start : node.stop] = node.end
        return ends


def plant(sequences: Sequence[list[int]], max_tokens: int) -> list[TokenTree]:
    """Lays sequences out in trees of at most `max_tokens` places each; a longer sequence gets a tree of its own.

    What comes out is a function of the sequences alone. A common beginning stands in each tree that needs it. Where a
    sequence does not fit any more, those after it that begin like it are tried for what room is left.

    Raises:
        ValueError: a sequence is empty.
    """
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    if any(array.size == 0 for array in arrays):
        raise ValueError("a sequence without tokens cannot be laid out")
    # Neighbours in the order of their token ids are those with the longest common beginnings.
    order = sorted(range(len(arrays)), key=lambda index: sequences[index])
    ordered = [arrays[index] for index in order]
    alike = [0, *(_common(one, other) for one, other in itertools.pairwise(ordered))]
    trees: list[TokenTree] = []
    waiting: Sequence[int] = range(len(ordered))
    while waiting:
        tree, last, seen = _Growing(), waiting[0], 0
        left: list[int] = []
        # How many tokens the next sequence begins with like the newest one of the tree.
        common = 0
        for place in waiting:
            common = min([common, *alike[last + 1 : place + 1]]) if tree.size else 0
            shared = tree.shares(common)
            if left and shared == 0:
                # What did not fit has company that begins like it; nothing further is looked at.
                break
            seen += 1
            if tree.size and tree.size + ordered[place].size - shared > max_tokens:
                left.append(place)
            else:
                tree.add(order[place], ordered[place], shared)
                common = ordered[place].size
            last = place
        trees.append(tree.done())
        waiting = [*left, *waiting[seen:]]
    return trees


def _common(one: Ints, other: Ints) -> int:
    """Length of the common beginning."""
    length = min(one.size, other.size)
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


@dataclass
class _Open:
    """A node on the way from the root to the newest token: token positions `low` to `high` of the newest sequence."""

    low: int
    high: int
    start: int


class _Growing:
    """A tree that is being laid; sequences come in the order of their token ids."""

    def __init__(self) -> None:
        self.size = 0
        self._path: list[_Open] = []
        self._nodes: list[Node] = []
        self._members: list[int] = []
        self._tokens: list[Ints] = []
        self._positions: list[Ints] = []
        self._places: list[Ints] = []

    def shares(self, alike: int) -> int:
        """How many tokens the next sequence will share, of the `alike` that it begins with like the newest one."""
        for node in self._path:
            if alike <= node.high:
                # Too little of a node isn't split off: the branch is moved up to where the node began.
                return alike if alike == node.high or alike - node.low >= MIN_SHARED else node.low
        return 0

    def add(self, index: int, array: Ints, shared: int) -> None:
        """Lays a sequence out behind the others, from its token `shared` on."""
        self._close(shared)
        top = self._path[-1] if self._path else None
        if top is not None and top.high > shared:
            self._nodes.append(Node(top.start + shared - top.low, top.high - shared, self.size))
            top.high = shared
        new = array.size - shared
        if new:
            self._path.append(_Open(shared, array.size, self.size))
        before = self._places[-1][:shared] if shared else array[:0]
        self._members.append(index)
        self._tokens.append(array[shared:])
        self._positions.append(np.arange(shared, array.size))
        self._places.append(np.concatenate((before, np.arange(self.size, self.size + new))))
        self.size += new

    def done(self) -> TokenTree:
        """The tree as it stands."""
        self._close(0)
        return TokenTree(
            np.concatenate(self._tokens),
            np.concatenate(self._positions),
            tuple(sorted(self._nodes, key=lambda node: node.start)),
            tuple(self._members),
            tuple(self._places),
        )

    def _close(self, shared: int) -> None:
        """Ends the nodes that begin behind the first `shared` tokens: nothing more will grow from them."""
        while self._path and self._path[-1].low >= shared:
            top = self._path.pop()
            self._nodes.append(Node(top.start, top.high - top.low, self.size))
