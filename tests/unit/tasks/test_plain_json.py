"""Values that plain JSON would change come back as they were."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.tasks import plain_json

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.integers()) | st.just("__python__")


def _nested(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sets(st.integers(), max_size=3)
        | st.dictionaries(_KEYS, inner, max_size=3)
    )


@given(st.recursive(_LEAVES, _nested, max_leaves=12))
def test_round_trip(value: object) -> None:
    assert plain_json.decode(json.loads(json.dumps(plain_json.encode(value)))) == value


def test_numpy_becomes_plain() -> None:
    encoded = plain_json.encode([np.int64(3), np.float64(0.5), np.str_("x"), True])
    assert json.loads(json.dumps(encoded)) == [3, 0.5, "x", True]


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(TypeError, match="ndarray"):
        plain_json.encode({"grid": np.zeros(2)})
    for forged in ({"__python__": "module"}, {"__python__": "dict", "items": [1]}, {"__python__": "set", "items": 3}):
        with pytest.raises(ValueError, match="not an encoded"):
            plain_json.decode(forged)
