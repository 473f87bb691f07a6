"""Malformed, oversized, forged and replayed rollouts: what a broken or hostile site could put on the broker.

Each kind makes one entry of the rollouts stream out of a ticket that is out; none of them may reach a batch, end the
ticket that it names, or stop the learner. `honest` makes the entry that the ticket's own holder would deliver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import zstandard

from longshore.proto.v1 import rollout_pb2, sampling_pb2, ticket_pb2, verdict_pb2
from longshore.rollout_queue import heads, payload
from longshore.rpc import convert, token_columns
from longshore.types import Ticket

Entry = dict[str, bytes | str | int]
Message = rollout_pb2.Rollout

VOCABULARY = 64
CONTEXT = 48
TURN_TOKENS = 16
NEWEST_VERSION = 7
MEGABYTE = 1_000_000
# What the kinds of one pass over all of them must stay below, so that a hundred thousand fit a test's time.
BOMB_BYTES = 4 * MEGABYTE


@dataclass(frozen=True)
class Kind:
    """One way to be wrong, and what the learner calls it. A reason of "" means: taken for a repeat, harmlessly."""

    name: str
    make: Callable[[Ticket], Entry]
    reason: str
    # Whether the ticket's own holder could deliver these bytes: then they end the ticket, as rejected.
    deliverable: bool = True


def honest_message(ticket: Ticket) -> Message:
    """What a right rollout of this ticket looks like, in the plain encoding."""
    given, sampled = [8, 9, 10], [11, 12, 13, 1]
    spans = [
        rollout_pb2.Span(kind=rollout_pb2.SPAN_KIND_GIVEN, length=len(given)),
        rollout_pb2.Span(
            kind=rollout_pb2.SPAN_KIND_SAMPLED,
            length=len(sampled),
            policy_version=NEWEST_VERSION,
            logprobs=[-0.5, -1.25, -0.75, -0.25],
            kv=rollout_pb2.KV_MARK_RECOMPUTED,
        ),
    ]
    return Message(
        schema_version=convert.SCHEMA_VERSION,
        ref=convert.ref_to_proto(ticket.ref),
        attempt=1,
        origin=rollout_pb2.ORIGIN_TICKET,
        task_id=ticket.task.task_id,
        purpose=convert.PURPOSE[ticket.purpose],
        segments=[rollout_pb2.Segment(segment_id="0", token_ids=given + sampled, spans=spans)],
        turns=[
            rollout_pb2.Turn(
                segment_id="0", start=len(given), length=len(sampled), finish=rollout_pb2.FINISH_REASON_STOP
            )
        ],
        sampling=[sampling_pb2.SamplingParams(temperature=1.0, max_new_tokens=TURN_TOKENS)],
        engines=[rollout_pb2.EngineFingerprint(engine="test", engine_version="1", dtype="float32")],
        min_version=NEWEST_VERSION,
        max_version=NEWEST_VERSION,
        verdicts=[
            verdict_pb2.Verdict(
                reward=float(ticket.ref.index % 2),
                verifier="test@1",
                revision=1,
                role=verdict_pb2.VERDICT_ROLE_TRAIN,
            )
        ],
        finish=rollout_pb2.FINISH_REASON_STOP,
        site="home",
        actor="actor-0",
    )


def honest(ticket: Ticket) -> bytes:
    """The serialised rollout that the ticket's holder delivers."""
    return honest_message(ticket).SerializeToString()


def entry_of(ticket: Ticket, body: bytes, **changes: bytes | str | None) -> Entry:
    """A stream entry as `deliver` writes it, with its payload or some words of its head changed, or left out (None)."""
    packed = payload.encode(body)
    words: dict[str, bytes | str | None] = {"schema": "1", "key": ticket.ref.key, "attempt": "1", "site": "home"}
    words |= {"awaiting": "0", "codec": packed.codec, "digest": packed.digest, "payload": packed.data, **changes}
    data = words.pop("payload")
    head = " ".join(str(word or "") for word in words.values())
    return {"rollout": head} if data is None else {"rollout": head, "payload": data}


# -- rollouts that are wrong inside ----------------------------------------------------------------------------------


def _changed(change: Callable[[Message], object]) -> Callable[[Ticket], Entry]:
    def make(ticket: Ticket) -> Entry:
        message = honest_message(ticket)
        change(message)
        return entry_of(ticket, message.SerializeToString())

    return make


def _set(name: str, value: object) -> Callable[[Message], object]:
    return lambda message: setattr(message, name, value)


def _logprob(value: float) -> Callable[[Message], object]:
    def change(message: Message) -> None:
        message.segments[0].spans[1].logprobs[2] = value

    return change


def _token(value: int) -> Callable[[Message], object]:
    def change(message: Message) -> None:
        message.segments[0].token_ids[4] = value

    return change


def _reward(value: float) -> Callable[[Message], object]:
    return lambda message: setattr(message.verdicts[0], "reward", value)


def _temperature(value: float) -> Callable[[Message], object]:
    return lambda message: setattr(message.sampling[0], "temperature", value)


def _version(value: int) -> Callable[[Message], object]:
    def change(message: Message) -> None:
        message.segments[0].spans[1].policy_version = value
        message.min_version = message.max_version = value

    return change


def _turns(*places: tuple[int, int]) -> Callable[[Message], object]:
    def change(message: Message) -> None:
        del message.turns[:]
        for start, length in places:
            message.turns.add(segment_id="0", start=start, length=length, finish=rollout_pb2.FINISH_REASON_STOP)

    return change


def _child(message: Message, name: str, parent: str, prefix: int, tokens: int = 1) -> None:
    span = rollout_pb2.Span(kind=rollout_pb2.SPAN_KIND_GIVEN, length=tokens)
    message.segments.add(
        segment_id=name, parent_segment_id=parent, prefix_len=prefix, token_ids=[8] * tokens, spans=[span]
    )


def _cycle(message: Message) -> None:
    _child(message, "1", "2", 1)
    _child(message, "2", "1", 1)


def _chain(message: Message) -> None:
    for number in range(1, 100):
        _child(message, str(number), str(number - 1), 1)


def _blow_up(message: Message) -> None:
    _child(message, "long", "", 0, tokens=20_000)
    for number in range(250):
        _child(message, f"c{number}", "long", 20_000)


def _long_sequence(message: Message) -> None:
    _child(message, "1", "0", 7, tokens=CONTEXT)


def _many_sampled(message: Message) -> None:
    more = TURN_TOKENS
    message.segments[0].token_ids.extend([8] * more)
    message.segments[0].spans[1].length += more
    message.segments[0].spans[1].logprobs.extend([-1.0] * more)


def _no_sample(message: Message) -> None:
    del message.segments[0].spans[1]
    del message.segments[0].token_ids[3:]
    del message.turns[:]


def _longer_span(message: Message) -> None:
    message.segments[0].token_ids.append(8)
    message.segments[0].spans[1].length += 1


def _empty_span(message: Message) -> None:
    message.segments[0].spans.add(kind=rollout_pb2.SPAN_KIND_GIVEN, length=0)


def _unknown_span(message: Message) -> None:
    message.segments[0].spans[0].kind = 9  # type: ignore[assignment]


def _newer_cache(message: Message) -> None:
    span = message.segments[0].spans[1]
    span.kv, span.kv_min_version = rollout_pb2.KV_MARK_CARRIED, NEWEST_VERSION + 1


def _held_out(message: Message) -> None:
    message.verdicts[0].role = verdict_pb2.VERDICT_ROLE_HELDOUT


def _token_rewards(message: Message) -> None:
    message.verdicts[0].token_rewards.extend([1.0] * 100)


def _other_purpose(message: Message) -> None:
    train, evaluation = ticket_pb2.TICKET_PURPOSE_TRAIN, ticket_pb2.TICKET_PURPOSE_EVALUATION
    message.purpose = evaluation if message.purpose == train else train


def _extra_logprobs(message: Message) -> None:
    message.segments[0].spans[1].logprobs.append(-1.0)


def _plain_and_packed(message: Message) -> None:
    message.segments[0].packed_token_ids = token_columns.pack_token_ids([1] * 7)


def _packed_bomb(message: Message) -> None:
    message.segments[0].packed_token_ids = zstandard.ZstdCompressor().compress(bytes(BOMB_BYTES))
    del message.segments[0].token_ids[:]


def _packed_nan(message: Message) -> None:
    span = message.segments[0].spans[1]
    del span.logprobs[:]
    message.segments[0].packed_logprobs = token_columns.pack_logprobs([-0.5, float("nan"), -0.5, -0.5])


def _torn_packed(message: Message) -> None:
    span = message.segments[0].spans[1]
    del span.logprobs[:]
    message.segments[0].packed_logprobs = token_columns.pack_logprobs([-0.5] * 4)[:-3]


def _without_prompt(message: Message) -> None:
    del message.segments[0].token_ids[:3]
    message.prompt_digest = b"0123456789abcdef"


INSIDE = [
    Kind("token ids plain and packed", _changed(_plain_and_packed), "malformed"),
    Kind("packed token ids that are a bomb", _changed(_packed_bomb), "oversized"),
    Kind("packed log-prob NaN", _changed(_packed_nan), "logprobs"),
    Kind("torn packed log-probs", _changed(_torn_packed), "logprobs"),
    Kind("a prompt left out that is not the ticket's", _changed(_without_prompt), "prompt"),
    Kind("schema of the future", _changed(_set("schema_version", 2)), "schema"),
    Kind(
        "another group's ticket", _changed(lambda m: setattr(m.ref, "group_id", m.ref.group_id + 1)), "unknown_ticket"
    ),
    Kind("a sibling's ticket", _changed(lambda m: setattr(m.ref, "index", m.ref.index ^ 1)), "unknown_ticket"),
    Kind("another job's", _changed(lambda m: setattr(m.ref.job, "job", "other")), "unknown_ticket"),
    Kind("another project's", _changed(lambda m: setattr(m.ref.job, "project", "other")), "unknown_ticket"),
    Kind("no job at all", _changed(lambda m: m.ref.ClearField("job")), "malformed"),
    Kind("attempt 0", _changed(_set("attempt", 0)), "malformed"),
    Kind("another task", _changed(_set("task_id", "another")), "unknown_ticket"),
    Kind("another purpose", _changed(_other_purpose), "unknown_ticket"),
    Kind("a version that does not exist", _changed(_version(NEWEST_VERSION + 1)), "versions"),
    Kind("versions that do not match", _changed(_set("min_version", 1)), "versions"),
    Kind("a cache newer than its version", _changed(_newer_cache), "versions"),
    Kind("a log-prob too few", _changed(_longer_span), "logprobs"),
    Kind("a log-prob too many", _changed(_extra_logprobs), "logprobs"),
    Kind("log-prob NaN", _changed(_logprob(float("nan"))), "logprobs"),
    Kind("log-prob minus infinity", _changed(_logprob(float("-inf"))), "logprobs"),
    Kind("log-prob above 0", _changed(_logprob(0.5)), "logprobs"),
    Kind("an impossible log-prob", _changed(_logprob(-1e30)), "logprobs"),
    Kind("reward NaN", _changed(_reward(float("nan"))), "not_finite"),
    Kind("reward infinite", _changed(_reward(float("inf"))), "not_finite"),
    Kind("reward 1e300", _changed(_reward(1e300)), "reward"),
    Kind("token rewards that do not fit", _changed(_token_rewards), "reward"),
    Kind("no verdict", _changed(lambda m: m.ClearField("verdicts")), "no_verdict"),
    Kind("a held-out verdict alone", _changed(_held_out), "no_verdict"),
    Kind("token -1", _changed(_token(2**32 - 1)), "token_ids"),
    Kind("a token beyond the vocabulary", _changed(_token(VOCABULARY)), "token_ids"),
    Kind("turns that overlap", _changed(_turns((3, 3), (4, 3))), "turns"),
    Kind("a turn outside its segment", _changed(_turns((3, 300))), "turns"),
    Kind("a turn on the prompt", _changed(_turns((2, 3))), "turns"),
    Kind("segments in a ring", _changed(_cycle), "malformed"),
    Kind("two segments of one name", _changed(lambda m: _child(m, "0", "", 0)), "malformed"),
    Kind("a prefix that is not there", _changed(lambda m: _child(m, "1", "0", 4_000_000_000)), "malformed"),
    Kind("a long prefix 250 times", _changed(_blow_up), "oversized"),
    Kind("a chain of a hundred segments", _changed(_chain), "oversized"),
    Kind("a sequence longer than the context", _changed(_long_sequence), "oversized"),
    Kind("more sampled than allowed", _changed(_many_sampled), "oversized"),
    Kind("nothing sampled", _changed(_no_sample), "empty"),
    Kind("spans that do not add up", _changed(lambda m: m.segments[0].token_ids.append(8)), "span_lengths"),
    Kind("an empty span", _changed(_empty_span), "span_lengths"),
    Kind("an unknown kind of span", _changed(_unknown_span), "malformed"),
    Kind("a span outside the tables", _changed(lambda m: m.ClearField("sampling")), "tables"),
    Kind("another temperature", _changed(_temperature(0.5)), "sampling"),
    Kind("temperature 1e-30", _changed(_temperature(1e-30)), "sampling"),
    Kind("top-p", _changed(lambda m: setattr(m.sampling[0], "top_p", 0.5)), "sampling"),
    Kind("an unknown end", _changed(_set("finish", 99)), "malformed"),
    Kind("turn info that is no JSON", _changed(lambda m: setattr(m.turns[0], "info_json", "{")), "malformed"),
    Kind("a megabyte of task id", _changed(_set("task_id", "t" * MEGABYTE)), "oversized"),
    Kind("a megabyte of site", _changed(_set("site", "s" * MEGABYTE)), "oversized"),
    Kind("a megabyte of actor", _changed(_set("actor", "a" * MEGABYTE)), "oversized"),
    Kind("a megabyte of reason", _changed(lambda m: setattr(m.verdicts[0], "reason", "r" * MEGABYTE)), "oversized"),
    Kind("no bytes", lambda ticket: entry_of(ticket, b""), "unreadable"),
    Kind("a torn rollout", lambda ticket: entry_of(ticket, honest(ticket)[:-7]), "malformed"),
    Kind("noise", lambda ticket: entry_of(ticket, bytes(range(255, 0, -1)) * 4), "malformed"),
]

# -- entries that are wrong outside: only a forger with a way to the broker can make them ----------------------------


def _bomb(size: int, declared: bool) -> Callable[[Ticket], Entry]:
    def make(ticket: Ticket) -> Entry:
        parameters = zstandard.ZstdCompressionParameters(write_content_size=1 if declared else 0)
        data = zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(size))
        return entry_of(ticket, honest(ticket), codec="zstd", payload=data)

    return make


def _declares_terabytes(ticket: Ticket) -> Entry:
    # Magic number, a descriptor for an 8-byte content size, the size, and a block that never comes.
    frame = b"\x28\xb5\x2f\xfd" + b"\xe0" + (2**42).to_bytes(8, "little") + b"\x01\x00\x00"
    return entry_of(ticket, honest(ticket), codec="zstd", payload=frame)


def _outside(**changes: bytes | str | None) -> Callable[[Ticket], Entry]:
    return lambda ticket: entry_of(ticket, honest(ticket), **changes)


def _keyed(change: Callable[[Ticket], str]) -> Callable[[Ticket], Entry]:
    return lambda ticket: entry_of(ticket, honest(ticket), key=change(ticket))


def _bare(**fields: bytes | str) -> Callable[[Ticket], Entry]:
    return lambda ticket: {"schema": "1", "key": ticket.ref.key, "attempt": "1", "site": "home", **fields}


OUTSIDE = [
    Kind("a wrong checksum", _outside(digest="0" * 64), "unreadable", deliverable=False),
    Kind("an unknown codec", _outside(codec="pickle"), "unreadable", deliverable=False),
    Kind("damaged zstd", _outside(codec="zstd", payload=b"\x28\xb5\x2f\xfd nonsense"), "unreadable", deliverable=False),
    Kind("an entry of another schema", _outside(schema="9"), "unreadable", deliverable=False),
    Kind("an entry without payload", _outside(payload=None), "unreadable", deliverable=False),
    Kind("an entry without codec", _outside(codec=None), "unreadable", deliverable=False),
    Kind("an entry torn in its head", lambda t: {"rollout": f"1 {t.ref.key} 1 ho"}, "unreadable", deliverable=False),
    Kind("an entry with two attempts", _keyed(lambda t: f"{t.ref.key} 1"), "unreadable", deliverable=False),
    Kind(
        "an entry without a head", lambda t: {"rollout": "", "payload": honest(t)}, "unknown_ticket", deliverable=False
    ),
    Kind("an entry whose head is noise", lambda t: {"rollout": b"\xff \x00" * 3}, "unknown_ticket", deliverable=False),
    Kind("a payload alone", _bare(payload=b"x"), "unreadable", deliverable=False),
    Kind("a bomb", _bomb(BOMB_BYTES, declared=True), "unreadable", deliverable=False),
    Kind("a bomb that hides its size", _bomb(BOMB_BYTES, declared=False), "unreadable", deliverable=False),
    Kind("a frame that declares terabytes", _declares_terabytes, "unreadable", deliverable=False),
    Kind("a path out of the storage", _outside(codec="blob+zstd", payload="../../etc/passwd"), "unreadable", False),
    Kind("an attempt that is no number", _outside(attempt="many"), "malformed", deliverable=False),
    Kind("a site's name of a page", _outside(site="s" * 4000), "malformed", deliverable=False),
    Kind("a site's name that is two", _outside(site="home@west"), "malformed", deliverable=False),
    Kind("a key that is none", _keyed(lambda ticket: "x"), "unknown_ticket", deliverable=False),
    Kind("a key of 5000 digits", _keyed(lambda ticket: "9" * 5000 + ".0"), "unknown_ticket", deliverable=False),
    Kind("a ticket never issued", _keyed(lambda ticket: "999999.0"), "unknown_ticket", deliverable=False),
    Kind("a place beyond the group", _keyed(lambda t: f"{t.ref.group_id}.99"), "unknown_ticket", deliverable=False),
    Kind("a key spelled otherwise", _keyed(lambda ticket: f"0{ticket.ref.key}"), "unknown_ticket", deliverable=False),
    Kind("a verdict before its rollout", _bare(verdict=b"\x09\x00\x00\x00\x00\x00\x00\xf0\x3f"), "verdict", False),
    Kind("an end without a right reason", _bare(final="Of Old Age!"), "malformed", deliverable=False),
    Kind("an end in a live state", _bare(final="queued"), "malformed", deliverable=False),
]

KINDS = [*INSIDE, *OUTSIDE]
REASONS = frozenset(kind.reason for kind in KINDS)


def deliverable(kinds: Iterable[Kind] = KINDS) -> list[Kind]:
    """Those that an actor's own delivery can be."""
    return [kind for kind in kinds if kind.deliverable]


def body_of(kind: Kind, ticket: Ticket) -> bytes:
    """The rollout inside a deliverable kind's entry."""
    fields = kind.make(ticket)
    data, head = fields["payload"], heads.read(str(fields["rollout"]).encode())
    assert isinstance(data, bytes)
    return payload.decode(payload.Packed(head.codec, data, head.digest))
