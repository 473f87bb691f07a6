"""Which pages are in use and what they hold, without a cache."""

from __future__ import annotations

import random

from longshore.generator.pages import PAGE, Pages

ROOT = -1


class Book:
    """Sequences over pages, as a decoder keeps them; and what each page really holds."""

    def __init__(self, count: int) -> None:
        self.pages = Pages(count)
        self.sequences: dict[int, tuple[int, list[int], list[int]]] = {}
        self.holds: dict[int, tuple[int, tuple[int, ...]]] = {}

    def fill(self, name: int, root: int, tokens: list[int]) -> int | None:
        """Returns how many tokens did not need to be computed; None: no room."""
        found = self.pages.find(root, tokens)
        for number, page in enumerate(found.pages):
            assert self.holds[page] == (root, tuple(tokens[: (number + 1) * PAGE]))
        if found.source >= 0:
            whole = len(found.pages) * PAGE
            kept = self.holds[found.source]
            assert kept[0] == root
            assert kept[1][: whole + found.tokens] == tuple(tokens[: whole + found.tokens])
        needed = len(tokens) // PAGE + 1 - len(found.pages)
        if needed > self.pages.available:
            self.pages.release([*found.pages, *([found.source] if found.source >= 0 else [])])
            return None
        own = self.pages.take(needed)
        assert not set(own) & {page for _, held, _ in self.sequences.values() for page in held}
        if found.source >= 0:
            self.pages.release([found.source])
        self.sequences[name] = (root, [*found.pages, *own], list(tokens))
        self._write(name, len(found.pages))
        return found.length

    def grow(self, name: int, token: int) -> bool:
        _, held, tokens = self.sequences[name]
        tokens.append(token)
        if len(tokens) // PAGE + 1 > len(held):
            if not self.pages.available:
                tokens.pop()
                return False
            held += self.pages.take(1)
        self._write(name, (len(tokens) - 1) // PAGE)
        return True

    def end(self, name: int) -> None:
        _, held, _ = self.sequences.pop(name)
        self.pages.release(held)

    def _write(self, name: int, first: int) -> None:
        root, held, tokens = self.sequences[name]
        for number in range(first, -(-len(tokens) // PAGE)):
            upto = min((number + 1) * PAGE, len(tokens))
            self.holds[held[number]] = (root, tuple(tokens[:upto]))
            before = held[number - 1] if number else root
            held[number] = self.pages.publish(before, held[number], tuple(tokens[number * PAGE : upto]))


def test_a_context_is_found_by_its_whole_pages_and_the_beginning_of_the_next() -> None:
    book = Book(8)
    tokens = list(range(40))
    assert book.fill(0, ROOT, tokens) == 0
    assert book.fill(1, ROOT, tokens) == 40
    assert book.sequences[1][1][:2] == book.sequences[0][1][:2]
    assert book.sequences[1][1][2] != book.sequences[0][1][2]
    assert book.fill(2, ROOT, [*tokens[:20], 99]) == 20
    assert book.fill(3, -2, tokens[:5]) == 0


def test_equal_pages_become_one() -> None:
    book = Book(8)
    for name in (0, 1):
        # Not to be found: as if both were computed at the same time.
        book.fill(name, ROOT, [7])
    for token in range(PAGE - 1):
        for name in (0, 1):
            book.grow(name, token)
    assert book.sequences[0][1][0] == book.sequences[1][1][0]
    book.end(0)
    assert book.pages.held == 2
    book.end(1)
    assert book.pages.held == 0


def test_what_is_unused_longest_goes_first() -> None:
    book = Book(4)
    for name, start in ((0, 0), (1, 100)):
        book.fill(name, ROOT, list(range(start, start + PAGE)))
        book.end(name)
    assert book.pages.available == 4
    # Two of the four were never published: they go first, then the page of sequence 0.
    taken = book.pages.take(3)
    assert book.pages.find(ROOT, list(range(100, 100 + PAGE))).length == PAGE
    assert book.pages.find(ROOT, list(range(PAGE))).length == 0
    book.pages.release(taken)


def test_pages_always_hold_what_the_index_says() -> None:
    rng = random.Random(0)
    found = full = 0
    for seed in range(4):
        book = Book(24)
        names = iter(range(100000))
        for _ in range(4000):
            if book.sequences and rng.random() < 0.7:
                name = rng.choice(list(book.sequences))
                if not book.grow(name, rng.randrange(2)) or len(book.sequences[name][2]) > 90:
                    full += 1
                    book.end(name)
            else:
                # Few tokens to choose from, so that much is alike; or the next turn of another sequence.
                tokens = [rng.randrange(2) for _ in range(rng.randrange(60))]
                if book.sequences and rng.random() < 0.5:
                    tokens = [*rng.choice(list(book.sequences.values()))[2], *tokens[:5]]
                cached = book.fill(next(names), -1 - rng.randrange(2) - seed, tokens)
                found += cached or 0
            held = {page for _, pages, _ in book.sequences.values() for page in pages}
            assert book.pages.held == len(held)
        for name in list(book.sequences):
            book.end(name)
        assert book.pages.held == 0
        assert len(book.pages.take(24)) == 24
    assert found > 1000
    assert full > 100
