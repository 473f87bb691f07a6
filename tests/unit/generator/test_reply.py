"""When a reply's tokens become an event."""

from __future__ import annotations

from longshore.generator.engine import EngineRequest
from longshore.generator.reply import FLUSH_S, FLUSH_TOKENS, Reply
from longshore.types import FinishReason, Sampling


def reply(
    tokens: int, *, prompt: int = 1, context: int = 1000, stop: tuple[int, ...] = (), watched: bool = False
) -> Reply:
    request = EngineRequest("r", (1,) * prompt, Sampling(1.0, tokens, stop), deadline=100.0, watched=watched)
    return Reply(request, slot=0, version=1, context=context)


def test_tokens_are_kept_until_there_are_enough_of_them() -> None:
    made = reply(1000)
    events = [made.add(5, -0.5, now=0.0) for _ in range(2 * FLUSH_TOKENS)]
    due = [event for event in events if event is not None]
    assert [len(event.token_ids) for event in due] == [FLUSH_TOKENS, FLUSH_TOKENS]
    assert due[0].finish is None


def test_tokens_are_kept_no_longer_than_the_limit() -> None:
    made = reply(1000)
    assert made.add(5, -0.5, now=7.0) is None
    assert made.add(6, -0.5, now=7.0 + FLUSH_S / 2) is None
    event = made.add(7, -0.5, now=7.0 + FLUSH_S)
    assert event is not None
    assert event.token_ids == (5, 6, 7)
    # The clock starts anew with the first token of the next event.
    assert made.add(8, -0.5, now=7.0 + FLUSH_S) is None


def test_who_watches_is_told_of_every_token() -> None:
    made = reply(1000, watched=True)
    events = [made.add(token, -0.5, now=0.0) for token in (5, 6)]
    assert [event.token_ids for event in events if event is not None] == [(5,), (6,)]


def test_the_limits_of_request_and_context_both_end_it() -> None:
    assert reply(1).add(5, -0.5, now=0.0).finish is FinishReason.LENGTH  # type: ignore[union-attr]
    assert reply(50, prompt=9, context=10).add(5, -0.5, now=0.0).finish is FinishReason.LENGTH  # type: ignore[union-attr]


def test_a_stop_token_that_is_also_the_last_is_a_stop() -> None:
    assert reply(1, stop=(5,)).add(5, -0.5, now=0.0).finish is FinishReason.STOP  # type: ignore[union-attr]


def test_a_swap_with_nothing_to_tell_is_no_event() -> None:
    assert reply(5).swapped(2) is None
