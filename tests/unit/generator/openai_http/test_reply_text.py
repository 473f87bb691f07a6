"""Text that grows token by token is the text of all tokens, and ends before a stop string."""

from __future__ import annotations

import functools
import itertools

import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from longshore.generator.openai_http.reply_text import GrowingText, StopStrings

HIDDEN = 256


@functools.cache
def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, as byte-level BPE without merges, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>"])
    assert core.token_to_id("<|end|>") == HIDDEN
    return core


def decode(token_ids: list[int]) -> str:
    return str(byte_tokenizer().decode(token_ids, skip_special_tokens=False))


def ids_of(data: bytes) -> list[int]:
    letters = {byte: letter for letter, byte in _bytes_of_letters().items()}
    return [byte_tokenizer().token_to_id(letters[byte]) for byte in data]


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(shifted)}


def grown(pieces: list[list[int]]) -> list[str]:
    text = GrowingText(decode, frozenset({HIDDEN}))
    return [*(text.add(piece) for piece in pieces), text.end()]


def cut(items: list[int], places: list[int]) -> list[list[int]]:
    borders = [0, *sorted(place % (len(items) + 1) for place in places), len(items)]
    return [items[a:b] for a, b in itertools.pairwise(borders)]


@given(st.text(max_size=120), st.lists(st.integers(0, 1000), max_size=60))
def test_the_pieces_of_a_text_are_the_text(said: str, places: list[int]) -> None:
    said = said.replace("\ufffd", "")
    pieces = grown(cut(ids_of(said.encode()), places))
    assert "".join(pieces) == said
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.binary(max_size=150), st.lists(st.integers(0, 1000), max_size=150))
def test_noise_reads_as_when_it_is_decoded_at_once(data: bytes, places: list[int]) -> None:
    assert "".join(grown(cut(ids_of(data), places))) == decode(ids_of(data))


def test_noise_is_not_held_back_for_ever() -> None:
    text = GrowingText(decode, frozenset())
    shown = [text.add(ids_of(b"\xff")) for _ in range(200)]
    assert len("".join(shown)) >= 150


def test_a_character_is_shown_with_its_last_byte() -> None:
    assert grown([[token] for token in ids_of("aé🦊".encode())]) == ["a", "", "é", "", "", "", "🦊", ""]


def test_hidden_tokens_are_not_shown() -> None:
    first, second = ids_of("é".encode())
    assert "".join(grown([[first, HIDDEN], [second, HIDDEN]])) == "é"


def stopped(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    finder = StopStrings(stops)
    text = "".join(finder.add(piece) for piece in pieces)
    return text + finder.end(), finder.found


ALPHABET = st.text("ab\n", max_size=30)


@given(st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4), st.lists(ALPHABET, max_size=12))
def test_a_text_is_cut_before_its_first_stop_string(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    finder = StopStrings(stops)
    said = ""
    for number, piece in enumerate(pieces, 1):
        said += finder.add(piece)
        if finder.found:
            # Found as soon as it is there, and where it is first.
            so_far = "".join(pieces[:number])
            assert not any(stop in "".join(pieces[: number - 1]) for stop in stops)
            assert said == so_far[: min(so_far.find(stop) for stop in stops if stop in so_far)]
            assert (finder.add("more"), finder.end()) == ("", "")
            return
        # No more is held back than may become a stop string.
        assert len("".join(pieces[:number])) - len(said) < max(map(len, stops))
    assert not any(stop in whole for stop in stops)
    assert said + finder.end() == whole


def test_a_stop_string_may_come_in_pieces() -> None:
    assert stopped(["</answer>"], ["4", "2</", "ans", "wer> and"]) == ("42", True)
    assert stopped(["</answer>"], ["4", "2</", "ans", "was"]) == ("42</answas", False)
