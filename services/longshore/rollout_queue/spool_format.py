"""How a spool lies on disk: bytes to records and back. Opens no file.

A segment is `MAGIC`, then frames: CRC-32 of the rest, length of the body, body. A body is a record, or a note that keys
were forgotten. The first frame that does not check out is where a crash tore the segment: what follows was never
acknowledged to anybody.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longshore.errors import IntegrityError

MAGIC = b"LSSPOOL1"
_FRAME = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
# kind, whether it awaits its verdict, attempt, lengths of key, entry id, final reason and detail; the payload is the
# rest.
_PUT = struct.Struct("<B?IIIII")
_PUT_KIND, _FORGET_KIND = 1, 2


@dataclass(frozen=True)
class SpoolRecord:
    """A finished rollout, or how its ticket ended without one (`final_reason`, `detail`).

    Example: SpoolRecord("12.3", 1, "1700000000000-0", b"...")
    """

    key: str
    attempt: int
    entry_id: str
    payload: bytes
    final_reason: str = ""
    detail: str = ""
    awaiting_verdict: bool = False


@dataclass(frozen=True)
class Scanned:
    """One frame of a segment: the key of a record, or the keys that were forgotten."""

    offset: int
    length: int
    key: str | None
    forgotten: tuple[str, ...] = ()


def put_frame(record: SpoolRecord) -> bytes:
    """A record as it is written."""
    texts = [text.encode() for text in (record.key, record.entry_id, record.final_reason, record.detail)]
    head = _PUT.pack(_PUT_KIND, record.awaiting_verdict, record.attempt, *(len(text) for text in texts))
    return _frame(b"".join((head, *texts, record.payload)))


def forget_frame(keys: Sequence[str]) -> bytes:
    """The note that these keys are of no more use."""
    parts = [bytes((_FORGET_KIND,))]
    for key in keys:
        encoded = key.encode()
        parts += (_LENGTH.pack(len(encoded)), encoded)
    return _frame(b"".join(parts))


def read_record(frame: bytes) -> SpoolRecord:
    """The record of a frame that `put_frame` made. Raises IntegrityError when the bytes are not those written."""
    body = _body(frame, 0)
    if body is None or len(body) + _FRAME.size != len(frame) or body[0] != _PUT_KIND:
        raise IntegrityError("a spooled record is damaged")
    _, awaiting, attempt, *lengths = _PUT.unpack_from(body)
    texts, start = [], _PUT.size
    for length in lengths:
        texts.append(str(body[start : start + length], "utf-8"))
        start += length
    key, entry_id, final_reason, detail = texts
    return SpoolRecord(key, attempt, entry_id, bytes(body[start:]), final_reason, detail, awaiting)


def scan(segment: bytes) -> Iterator[Scanned]:
    """The frames of a segment, in order, up to the first that is torn."""
    offset = len(MAGIC)
    while (body := _body(segment, offset)) is not None:
        length = _FRAME.size + len(body)
        if body[0] == _PUT_KIND:
            key_length = _PUT.unpack_from(body)[3]
            key = str(body[_PUT.size : _PUT.size + key_length], "utf-8")
            yield Scanned(offset, length, key)
        else:
            yield Scanned(offset, length, None, tuple(_forgotten(body)))
        offset += length


def _frame(body: bytes) -> bytes:
    length = _LENGTH.pack(len(body))
    return _LENGTH.pack(zlib.crc32(body, zlib.crc32(length))) + length + body


def _body(data: bytes, offset: int) -> memoryview | None:
    """The body of the frame at an offset; None unless it is whole."""
    if offset + _FRAME.size > len(data):
        return None
    checksum, length = _FRAME.unpack_from(data, offset)
    start = offset + _FRAME.size
    if not 0 < length <= len(data) - start:
        return None
    body = memoryview(data)[start : start + length]
    whole = zlib.crc32(body, zlib.crc32(_LENGTH.pack(length))) == checksum
    return body if whole and body[0] in (_PUT_KIND, _FORGET_KIND) else None


def _forgotten(body: memoryview) -> Iterator[str]:
    start = 1
    while start < len(body):
        (length,) = _LENGTH.unpack_from(body, start)
        start += _LENGTH.size
        yield str(body[start : start + length], "utf-8")
        start += length
