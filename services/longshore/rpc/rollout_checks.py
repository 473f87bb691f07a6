"""Bounds that every rollout from another process must keep: names, numbers and sizes that no honest one exceeds.

Knows no job: what depends on the model or on the ticket is the learner's to check.
"""

from __future__ import annotations

from collections.abc import Iterable

from longshore.errors import Rejected
from longshore.types import GivenSpan, Rollout, Segment, Turn, Verdict

MAX_TOKENS = 4_000_000
MAX_NAME_CHARACTERS = 256
MAX_TASK_ID_CHARACTERS = 4096
MAX_REASON_CHARACTERS = 4096
MAX_TABLE_ENTRIES = 1024
MAX_SEGMENTS = 100_000
MAX_VERDICTS = 64
# Rewards are averaged and squared in float32.
MAX_REWARD = 1e6
# Nothing less likely can be drawn from a distribution of doubles.
MIN_LOGPROB = -1000.0


def check_bounds(rollout: Rollout) -> None:
    """Raises Rejected: `oversized`, `malformed`, `logprobs`, `versions`, `turns` or `reward`."""
    _check_names(rollout)
    _check_sizes(rollout)
    _check_spans(rollout)
    _check_turns(rollout)
    for verdict in rollout.verdicts:
        _check_verdict(verdict, rollout)


def _check_names(rollout: Rollout) -> None:
    if not rollout.attempt:
        raise Rejected("malformed", "attempts are counted from 1")
    _check_short("task_id", [rollout.task_id], MAX_TASK_ID_CHARACTERS)
    _check_short("site or actor", [rollout.site, rollout.actor])
    _check_short("a segment's id", [segment.segment_id for segment in rollout.segments])
    for engine in rollout.engines:
        names = (engine.engine, engine.engine_version, engine.dtype, engine.config_digest)
        _check_short("an engine's fingerprint", names)


def _check_sizes(rollout: Rollout) -> None:
    tables = (rollout.engines, rollout.sampling, *(sampling.stop_token_ids for sampling in rollout.sampling))
    if any(len(table) > MAX_TABLE_ENTRIES for table in tables):
        raise Rejected("oversized", f"a table of more than {MAX_TABLE_ENTRIES} entries")
    if len(rollout.segments) > MAX_SEGMENTS or len(rollout.verdicts) > MAX_VERDICTS:
        raise Rejected("oversized", "too many segments or verdicts")
    # A prefix that many segments share is trained on once for each of them.
    total, prefixes = 0, dict[str, int]()
    for segment in rollout.segments:
        before = prefixes[segment.parent_segment_id] + segment.prefix_len if segment.parent_segment_id else 0
        prefixes[segment.segment_id] = before
        total += before + len(segment.token_ids)
    if total > MAX_TOKENS:
        raise Rejected("oversized", f"more than {MAX_TOKENS} tokens with the prefixes of all segments")


def _check_spans(rollout: Rollout) -> None:
    for span in rollout.sampled_spans:
        if min(span.logprobs) < MIN_LOGPROB:
            raise Rejected("logprobs", f"nothing with a log-prob below {MIN_LOGPROB:.0f} can have been sampled")
        if span.kv_min_version is not None and span.kv_min_version > span.version:
            raise Rejected("versions", "a cache cannot be newer than the version that it served")


def _check_turns(rollout: Rollout) -> None:
    segments = {segment.segment_id: segment for segment in rollout.segments}
    by_segment: dict[str, list[Turn]] = {}
    for turn in rollout.turns:
        before = by_segment.setdefault(turn.segment_id, [])
        if before and turn.start < before[-1].start + before[-1].length:
            raise Rejected("turns", "turns overlap, or are out of order")
        before.append(turn)
    for segment_id, turns in by_segment.items():
        if not _all_sampled(segments[segment_id], turns):
            raise Rejected("turns", "a turn covers tokens that were not sampled")


def _all_sampled(segment: Segment, turns: Iterable[Turn]) -> bool:
    """Whether the turns of one segment, in order, lie on sampled spans alone."""
    given: list[tuple[int, int]] = []
    at = 0
    for span in segment.spans:
        if isinstance(span, GivenSpan):
            given.append((at, at + span.length))
        at += span.length
    spot = 0
    for turn in turns:
        while spot < len(given) and given[spot][1] <= turn.start:
            spot += 1
        if spot < len(given) and given[spot][0] < turn.start + turn.length:
            return False
    return True


def _check_verdict(verdict: Verdict, rollout: Rollout) -> None:
    _check_short("a verdict's verifier or part", [verdict.verifier, *verdict.breakdown])
    _check_short("a verdict's reason", [verdict.reason], MAX_REASON_CHARACTERS)
    if len(verdict.breakdown) > MAX_TABLE_ENTRIES:
        raise Rejected("oversized", f"a verdict of more than {MAX_TABLE_ENTRIES} parts")
    if len(verdict.turn_rewards) not in (0, len(rollout.turns)):
        raise Rejected("reward", f"{len(verdict.turn_rewards)} turn rewards for {len(rollout.turns)} turns")
    if len(verdict.token_rewards) not in (0, rollout.num_sampled):
        raise Rejected("reward", f"{len(verdict.token_rewards)} token rewards for {rollout.num_sampled} sampled tokens")
    numbers = (verdict.reward, *verdict.turn_rewards, *verdict.token_rewards)
    if any(abs(number) > MAX_REWARD for number in numbers):
        raise Rejected("reward", f"rewards must lie within {MAX_REWARD:.0f} of 0")


def _check_short(what: str, texts: Iterable[str], limit: int = MAX_NAME_CHARACTERS) -> None:
    for text in texts:
        if len(text) > limit:
            raise Rejected("oversized", f"{what} has {len(text)} characters, at most {limit} are allowed")
