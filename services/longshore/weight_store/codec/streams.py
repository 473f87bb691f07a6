"""A section's two streams, in Python: bits, and an adaptive binary range coder's bytes. kernel.c has the same in C.

The range coder is that of LZMA (carry and all), its probabilities 16 bits, each bin's rate of learning 1/n at first.
"""

from __future__ import annotations

from collections.abc import Callable

from longshore.weight_store.codec.codes import ADAPTIVE, UNIT

# Added to a step that changes the sign.
FLIPPED = 2**40
MAX_UNARY = 24

_TOP = 1 << 24
_SLOWEST = 127
_RATES = [131072 // (2 * seen + 3) for seen in range(_SLOWEST + 1)]

# P(bit is 0) * 65536, and bits seen.
Bin = list[int]


def _learn(own: Bin, bit: int) -> None:
    own[0] += ((64 if bit else 65472) - own[0]) * _RATES[own[1]] >> 16
    own[1] = min(own[1] + 1, _SLOWEST)


def _divisor(code: int) -> tuple[int, int, int]:
    """Golomb's divisor, how many remainders are short, and a short one's bits."""
    number = code - 1
    divisor = ((4 + (number & 3)) << (number >> 2)) >> 2
    bits = 1 if divisor < 2 else (divisor - 1).bit_length()
    return divisor, (1 << bits) - divisor, bits - 1


class _Bins:
    """Bins by name, each as it was at the start until it is used."""

    def __init__(self) -> None:
        self._bins: dict[tuple[int, ...], Bin] = {}

    def __call__(self, *name: int) -> Bin:
        return self._bins.setdefault(name, [32768, 0])


_MORE, _UNIT, _FLIP, _DOWN, _LONGER, _MANTISSA = range(6)


def _code_step(
    bins: _Bins, code: int, bit: Callable[[Bin, int], int], flip: int, down: int, size: int
) -> tuple[int, int, int, int, int]:
    """Codes a step's adaptive bits, those known as given; reading, `bit` ignores what it is given.

    Returns flip, down, the size's bits in all less one, its highest bits, and how many of them follow the first.
    """
    flip = bit(bins(_FLIP, code), flip)
    down = bit(bins(_DOWN, code, flip), down)
    kind = flip * 2 + down
    length, whole = 0, size.bit_length() - 1
    while length < 31 and bit(bins(_LONGER, code, kind, length), int(length < whole)):
        length += 1
    node = 1
    shown = min(2, length)
    for place in range(shown):
        node = node << 1 | bit(bins(_MANTISSA, code, kind, length, node), size >> (length - 1 - place) & 1)
    return flip, down, length, node, shown


class StreamWriter:
    def __init__(self) -> None:
        self._bins = _Bins()
        self._bits = bytearray()
        self._word = 0
        self._count = 0
        self._ranges = bytearray()
        self._low = 0
        self._range = 2**32 - 1
        self._cache = 0
        self._pending = 1
        self._used = False

    def gap(self, code: int, gap: int) -> None:
        if code >= ADAPTIVE:
            own = self._bins(_MORE, code & 63)
            for _ in range(gap):
                self._bit(own, 1)
            self._bit(own, 0)
            return
        divisor, short, bits = _divisor(code)
        quotient, rest = divmod(gap, divisor)
        if quotient >= MAX_UNARY:
            self._put((1 << MAX_UNARY) - 1, MAX_UNARY)
            self._put(gap, 31)
            return
        self._put((1 << quotient) - 1, quotient + 1)
        if rest < short:
            self._put(rest, bits)
        else:
            self._put((rest + short) >> 1, bits)
            self._put((rest + short) & 1, 1)

    def step(self, code: int, step: int, flip: bool) -> None:
        down, unit = int(step < 0), abs(step) == 1 and not flip
        if code != UNIT:
            self._bit(self._bins(_UNIT, code & 63), int(unit))
        if unit:
            self._put(down, 1)
            return
        size = abs(step) + flip
        _, _, length, _, shown = _code_step(self._bins, code & 63, self._bit, int(flip), down, size)
        self._put(size & ((1 << (length - shown)) - 1), length - shown)

    def finish(self) -> list[bytes]:
        if self._count:
            self._put(0, 8 - self._count)
        if self._used:
            for _ in range(5):
                self._shift()
        return [bytes(self._bits), bytes(self._ranges[1:])]

    def _put(self, value: int, count: int) -> None:
        self._word |= value << self._count
        self._count += count
        while self._count >= 8:
            self._bits.append(self._word & 255)
            self._word >>= 8
            self._count -= 8

    def _bit(self, own: Bin, bit: int) -> int:
        self._used = True
        bound = (self._range >> 16) * own[0]
        if bit:
            self._low += bound
            self._range -= bound
        else:
            self._range = bound
        _learn(own, bit)
        while self._range < _TOP:
            self._range <<= 8
            self._shift()
        return bit

    def _shift(self) -> None:
        if self._low < 0xFF000000 or self._low >= 2**32:
            carry = self._low >> 32
            byte = self._cache
            for _ in range(self._pending):
                self._ranges.append((byte + carry) & 255)
                byte = 0xFF
            self._pending = 0
            self._cache = self._low >> 24 & 255
        self._pending += 1
        self._low = (self._low & 0x00FFFFFF) << 8


class StreamReader:
    """Past a stream's end it reads zeros; so what is read is bounded by the elements alone."""

    def __init__(self, bits: bytes, ranges: bytes, elements: int) -> None:
        self._bins = _Bins()
        self._bits = bits
        self._at = 0
        self._ranges = iter(ranges)
        self._range = 2**32 - 1
        self._code: int | None = None
        self._budget = elements

    def gap(self, code: int) -> int:
        if code >= ADAPTIVE:
            gap, own = 0, self._bins(_MORE, code & 63)
            while self._budget > 0 and self._bit(own, 0):
                gap += 1
                self._budget -= 1
            return gap
        divisor, short, bits = _divisor(code)
        quotient = 0
        while quotient < MAX_UNARY and self._take(1):
            quotient += 1
        if quotient == MAX_UNARY:
            return self._take(31)
        rest = self._take(bits)
        if rest >= short:
            rest = (rest << 1 | self._take(1)) - short
        return quotient * divisor + rest

    def step(self, code: int) -> int:
        """The magnitude's step, and FLIPPED where the sign changes."""
        if code == UNIT or self._bit(self._bins(_UNIT, code & 63), 0):
            return 1 - 2 * self._take(1)
        flip, down, length, node, shown = _code_step(self._bins, code & 63, self._bit, 0, 0, 1)
        size = (node << (length - shown) | self._take(length - shown)) - flip
        return (-size if down else size) + FLIPPED * flip

    def done(self) -> bool:
        """Whether the bits read are the stream's."""
        return (self._at + 7) // 8 == len(self._bits)

    def _take(self, count: int) -> int:
        first, last = self._at >> 3, (self._at + count + 7) >> 3
        word = int.from_bytes(self._bits[first:last], "little") >> (self._at & 7)
        self._at += count
        return word & ((1 << count) - 1)

    def _bit(self, own: Bin, _: int) -> int:
        if self._code is None:
            self._code = int.from_bytes(bytes(next(self._ranges, 0) for _ in range(4)), "big")
        bound = (self._range >> 16) * own[0]
        bit = int(self._code >= bound)
        if bit:
            self._code -= bound
            self._range -= bound
        else:
            self._range = bound
        _learn(own, bit)
        while self._range < _TOP:
            self._range <<= 8
            self._code = (self._code << 8 | next(self._ranges, 0)) & 0xFFFFFFFF
        return bit
