from __future__ import annotations

import io
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.errors import IntegrityError, Rejected
from longshore.weight_store import bundle

FILES = {"tokenizer.json": b"{}" * 10, "config.json": b'{"a": 1}', "special_tokens_map.json": b""}


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return buffer.getvalue()


def test_files_come_back() -> None:
    assert bundle.unpack(bundle.pack(FILES)) == FILES


def test_the_same_files_give_the_same_bytes() -> None:
    assert bundle.pack(FILES) == bundle.pack(dict(reversed(FILES.items())))


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", "..", ".", ".hidden", "a\\b", "C:x", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(Rejected):
        bundle.pack({name: b"x"})
    # Put in afterwards, because zipfile would not write some of these names.
    stand_in = "n" * len(name)
    smuggled = archive({stand_in: b"x"}).replace(stand_in.encode(), name.encode())
    with pytest.raises(IntegrityError, match="plain file name"):
        bundle.unpack(smuggled)


def test_a_bomb_is_refused() -> None:
    small = archive({"config.json": b"\0" * 10_000_000}, zipfile.ZIP_DEFLATED)
    assert len(small) < 100_000
    with pytest.raises(IntegrityError, match="compressed"):
        bundle.unpack(small)


def test_too_many_files_are_refused() -> None:
    files = {f"f{number}": b"" for number in range(bundle.MAX_FILES + 1)}
    with pytest.raises(Rejected):
        bundle.pack(files)
    with pytest.raises(IntegrityError):
        bundle.unpack(archive(files))


def test_a_false_size_is_refused() -> None:
    """The directory of the archive claims more than there is."""
    data = bundle.pack({"config.json": b"x" * 100})
    claimed = (100).to_bytes(4, "little") * 2
    with pytest.raises(IntegrityError):
        bundle.unpack(data.replace(claimed, (2**26 + 1).to_bytes(4, "little") * 2))
    with pytest.raises(IntegrityError):
        bundle.unpack(data.replace(claimed, (5000).to_bytes(4, "little") * 2))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("config.json", b"1")
        file.writestr("config.json", b"2")
    with pytest.raises(IntegrityError):
        bundle.unpack(buffer.getvalue())


@pytest.mark.parametrize("data", [b"", b"not a zip", bundle.pack(FILES)[:-10], bundle.pack(FILES)[20:]])
def test_what_is_no_archive_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        bundle.unpack(data)


@given(st.data())
def test_no_damage_does_worse_than_be_refused(data: st.DataObject) -> None:
    packed = bytearray(bundle.pack(FILES))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        files = bundle.unpack(bytes(packed))
    except IntegrityError:
        return
    # What is not covered by a CRC is attributes, times and names.
    assert set(files.values()) <= set(FILES.values())


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(Rejected):
        bundle.pack({"": b"x"})


def test_a_damaged_file_is_refused() -> None:
    with pytest.raises(IntegrityError):
        bundle.unpack(bundle.pack(FILES).replace(b'{"a": 1}', b'{"a": 2}'))
