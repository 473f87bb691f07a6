"""Which objects of a job can go: a pure function of a listing.

Kept are the newest versions of each weight set, every version that a pointer names, and what those are made of: the
full encodings and deltas by which a newcomer reaches each of them, and the versions that their adapters are decoded
against: the next version's will be too. Besides, the single deltas of the recent past, for
receivers that are behind and for merging; their versions need not be within a newcomer's reach. Whatever belongs to no
version, such as the leftovers of a publish that was cut off, goes after a grace time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePosixPath

from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store import layout
from longshore.weight_store.decoding import CODECS, is_adapter
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import StoredObject
from longshore.weight_store.planner import cheapest_path

# A publish that is under way has its bytes in place before its manifest.
GRACE_S = 600.0
# Versions whose merged deltas are kept, counted from the newest.
RECENT = 8
# Versions whose single deltas are kept, while all of them together are no larger than so many full encodings: beyond
# that, a full one is about as good.
HISTORY = 64 + RECENT
HISTORY_FULLS = 2

Encodings = Mapping[int, Sequence[weights_pb2.Encoding]]


def removable(
    job: JobRef,
    listing: Sequence[StoredObject],
    encodings: Mapping[VersionKey, Sequence[weights_pb2.Encoding]],
    keep: int,
    named: Collection[VersionKey],
    now: float,
    assets_of: Callable[[VersionKey], str],
) -> list[str]:
    """Paths to delete, in order: a crash half way leaves no version whose parts are missing.

    Args:
        listing: every object of the job.
        encodings: of every version that exists.
        keep: newest versions kept, per weight set.
        named: versions that pointers hold.
        now: Unix seconds.
        assets_of: hex name of a version's asset bundle; asked only when there is more than one bundle.
    """
    held = _held(encodings, keep, named)
    # Newest first, because later versions may be deltas from earlier ones.
    retired = sorted(encodings.keys() - held.keys(), reverse=True)
    gone = [layout.manifest_path(job, key) for key in retired]

    live, dropped = set(), set()
    for item in listing:
        key = layout.version_of(job, item.path)
        if key is None or item.path.endswith("/manifest"):
            continue
        name = _name(item.path)
        if _stays(key, name, item, held, encodings, now):
            live.add(name)
        else:
            gone.append(item.path)
            dropped.add(name)

    root = layout.job_prefix(job)
    for item in _below(listing, f"{root}/blobs/"):
        if _name(item.path) not in live and (_name(item.path) in dropped or _expired(item, now)):
            gone.append(item.path)
    bundles = _below(listing, f"{root}/assets/")
    if len(bundles) > 1:
        used = {assets_of(key) for key in held}
        gone += [item.path for item in bundles if _name(item.path) not in used and _expired(item, now)]
    return gone


def asked_for(job: JobRef, listing: Sequence[StoredObject], now: float) -> set[VersionKey]:
    """A mirror's versions that came within the grace time and after a newer one: somebody asked for them.

    They stay until who asked has read them, or a pointer names them.
    """
    written: dict[VersionKey, float] = {}
    for item in listing:
        key = layout.version_of(job, item.path)
        if key is not None and item.path.endswith("/manifest"):
            written[key] = item.modified_at
    found: set[VersionKey] = set()
    # By weight set, of the versions that are newer than the one that is looked at.
    earliest: dict[int, float] = {}
    for key in sorted(written, reverse=True):
        at = written[key]
        if at > earliest.get(key.weight_set, at) and now - at <= GRACE_S:
            found.add(key)
        earliest[key.weight_set] = min(at, earliest.get(key.weight_set, at))
    return found


def wanted(encodings: Encodings, keep: int, named: Collection[int]) -> dict[int, set[bytes]]:
    """The versions of one weight set that stay, each with the SHA-256 of its encodings that do."""
    newest = sorted(encodings, reverse=True)
    kept = {*newest[:keep], *(version for version in named if version in encodings)}
    bases = {item.base_version for version in kept for item in encodings[version] if is_adapter(item)}
    kept |= bases & encodings.keys()
    recent = set(newest[:RECENT])
    stays: dict[int, set[bytes]] = {}
    for version in kept:
        stays[version] = {
            item.sha256
            for item in encodings[version]
            if item.kind != weights_pb2.ENCODING_KIND_MERGED_DELTA or version in recent
        }
    for version in kept:
        steps = cheapest_path(encodings, (), version, CODECS)
        if steps is None:
            # Nothing leads here; what there is may still serve someone who has a base.
            stays[version] |= {item.sha256 for item in encodings[version]}
        for step in steps or ():
            stays.setdefault(step.version, set()).add(step.encoding.sha256)
    for version, sha256 in _history(encodings, newest):
        stays.setdefault(version, set()).add(sha256)
    return stays


def _history(encodings: Encodings, newest: Sequence[int]) -> list[tuple[int, bytes]]:
    """The chain of single deltas that ends at the newest version, as far back as it pays to keep it."""
    full = [item.size for items in encodings.values() for item in items if item.kind == weights_pb2.ENCODING_KIND_FULL]
    room = HISTORY_FULLS * min(full, default=0)
    found: list[tuple[int, bytes]] = []
    for version in newest[:HISTORY]:
        single = min(
            (item for item in encodings[version] if item.kind == weights_pb2.ENCODING_KIND_DELTA),
            key=lambda item: item.size,
            default=None,
        )
        if single is None or single.size > room or (found and version != found[-1][0] - 1):
            break
        room -= single.size
        found.append((version, single.sha256))
    return found


def _held(
    encodings: Mapping[VersionKey, Sequence[weights_pb2.Encoding]], keep: int, named: Collection[VersionKey]
) -> dict[VersionKey, set[bytes]]:
    held = {}
    for weight_set in {key.weight_set for key in encodings}:
        own = {key.version: items for key, items in encodings.items() if key.weight_set == weight_set}
        pinned = {key.version for key in named if key.weight_set == weight_set}
        for version, items in wanted(own, keep, pinned).items():
            held[VersionKey(weight_set, version)] = items
    return held


def _stays(
    key: VersionKey,
    name: str,
    item: StoredObject,
    held: Mapping[VersionKey, set[bytes]],
    encodings: Mapping[VersionKey, Sequence[weights_pb2.Encoding]],
    now: float,
) -> bool:
    if key in held and any(known.sha256.hex() == name for known in encodings[key]):
        return bytes.fromhex(name) in held[key]
    # Of no version, or a record that cannot be read; a retired version's goes at once.
    return (key in held or key not in encodings) and not _expired(item, now)


def _below(listing: Sequence[StoredObject], prefix: str) -> list[StoredObject]:
    return [item for item in listing if item.path.startswith(prefix)]


def _name(path: str) -> str:
    return PurePosixPath(path).name


def _expired(item: StoredObject, now: float) -> bool:
    return now - item.modified_at > GRACE_S
