"""Asset bundles: config.json and tokenizer files in one zip archive, the same bytes for the same files.

Nothing is compressed, because compressed bytes would differ between zlib versions. What is unpacked came over a wire.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping

from longshore.errors import IntegrityError, Rejected

MAX_FILES = 256
MAX_BUNDLE_BYTES = 64 * 1024 * 1024
# A bundle travels in one gRPC message beside its manifest.
MAX_PACKED_BYTES = 56 * 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
# The oldest time a zip archive can hold.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def pack(files: Mapping[str, bytes]) -> bytes:
    """Raises Rejected: a name that is not a plain file name, or more bytes than may be published."""
    for name in files:
        if not _NAME.fullmatch(name):
            raise Rejected("assets", f"{name!r} is not a plain file name")
    size = sum(len(data) for data in files.values())
    if size > MAX_PACKED_BYTES or len(files) > MAX_FILES:
        raise Rejected(
            "assets", f"{len(files)} files of {size} bytes; at most {MAX_FILES} files of {MAX_PACKED_BYTES} are allowed"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def unpack(archive: bytes) -> dict[str, bytes]:
    """The files by name.

    Raises:
        IntegrityError: not a zip archive, a name that could lead elsewhere, or more than MAX_BUNDLE_BYTES unpacked.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            entries = file.infolist()
            _check(entries)
            return {entry.filename: file.read(entry) for entry in entries}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise IntegrityError(f"the asset bundle is not a sound zip archive: {error}") from None


def _check(entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    for entry in entries:
        # As written in the archive: zipfile cuts `filename` at a zero byte.
        if not _NAME.fullmatch(entry.orig_filename):
            raise IntegrityError(f"the asset bundle holds {entry.orig_filename!r}, which is not a plain file name")
        # Also what keeps a bomb out: stored files cannot be larger than the archive.
        if entry.compress_type != zipfile.ZIP_STORED:
            raise IntegrityError(f"{entry.filename} in the asset bundle is compressed; bundles are stored as they are")
    if len(set(names)) != len(names):
        raise IntegrityError("the asset bundle holds a name twice")
    size = sum(entry.file_size for entry in entries)
    if size > MAX_BUNDLE_BYTES or len(entries) > MAX_FILES:
        raise IntegrityError(f"the asset bundle would unpack to {len(entries)} files of {size} bytes")
