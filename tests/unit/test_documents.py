"""Texts of strangers: what is read of them, and what is refused in time."""

from __future__ import annotations

import datetime

import pytest

from longshore.documents import MAX_DEPTH, parse_json, parse_yaml, unplain


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_plain_values_are_read(parse) -> None:
    assert parse('{"a": [1, 2.5, "x", true, null], "b": {"c": "\u00e9"}}') == {
        "a": [1, 2.5, "x", True, None],
        "b": {"c": "\u00e9"},
    }


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (parse_json, '{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        (parse_yaml, "a: 1\nb:\n  c: 1\n  c: 2\n", "line 4, column 3: the key 'c' is there twice"),
        (parse_yaml, "a: &x [1]\nb: *x\n", "aliases"),
        (parse_yaml, "name: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        (parse_yaml, "a: 2020-13-45", "month must be in 1..12"),
        (parse_yaml, "a: " + "9" * 5000, "4300 digits"),
        (parse_yaml, "a: 1\n\tb: 2", "line 2, column 1"),
        (parse_yaml, "a: 1\n---\nb: 2", "another document"),
        # Each of these would take the parser minutes, or more stack than there is.
        (parse_yaml, "[" * 300_000, "deeper than 64 levels"),
        (parse_yaml, "- " * 300_000, "deeper than 64 levels"),
        (parse_yaml, "{a: " * 200_000, "deeper than 64 levels"),
        (parse_json, "[" * 300_000, "deeper than 64 levels"),
    ],
)
def test_what_is_refused(parse, text: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_json_cannot_carry_is_named_by_its_path() -> None:
    document = {
        "day": datetime.date(2026, 1, 2),
        "options": {"nan": float("nan"), "set": {1}, "fine": [1, "x", None, True, -0.5]},
        "list": [0, float("inf"), "\ud800"],
        "huge": 2**63,
        "zero": "a\0b",
        "inner": {5: 1, "\udfff": 2},
    }
    assert sorted(fault.path for fault in unplain(document)) == [
        "day",
        "huge",
        "inner.5",
        "inner.?",
        "list.1",
        "list.2",
        "options.nan",
        "options.set",
        "zero",
    ]
    assert all(str(fault).isprintable() for fault in unplain(document))


def test_depth_has_its_limit() -> None:
    document: object = "x"
    for _ in range(MAX_DEPTH):
        document = [document]
    assert unplain(document) == []
    (fault,) = unplain([document])
    assert "deeper" in fault.message
