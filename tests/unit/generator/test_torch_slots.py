"""What concerns the slot engine's own loop."""

from __future__ import annotations

import pytest
from engine_rig import ENGINES, WAIT_S, PausedAtFirstEvent, Rig, assert_matches
from tiny_llama import tiny_model

from longshore.generator.slot_decoder import DecodeStep


def test_a_version_is_not_let_go_while_a_request_for_it_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the very step that ends the last request which it was held for."""
    old, new = tiny_model(0), tiny_model(9)
    rig = Rig(ENGINES["torch-slots"], old, residents=2)
    rig.serve(old, 1)
    decoder = rig.engine._decoder  # type: ignore[attr-defined]
    rig.submit("first", tokens=40, version=(1, 1))
    with PausedAtFirstEvent(rig, "first"):
        rig.stage(new, 2)
        swapped = rig.engine.swap()
        decode, left = decoder.decode, [40 - 32]

        def last_step() -> DecodeStep:
            left[0] -= 1
            if left[0] == 0:
                rig.submit("second", tokens=4, version=(1, 1))
            step: DecodeStep = decode()
            return step

        monkeypatch.setattr(decoder, "decode", last_step)
    swapped.result(WAIT_S)
    first, second = rig.wait("first", "second")
    assert {event.version for event in first.events} == {1}
    assert second.failure is None, second.failure
    assert_matches(second, old, (3, 4, 5, 6))
    rig.until(lambda: rig.engine.status().beside == ())
    rig.engine.close()
