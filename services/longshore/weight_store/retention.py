"""Which objects of a job can go: a pure function of a listing.

Kept are the newest versions of each weight set, every version that a pointer names, and what those are made of.
Whatever belongs to no version, such as the leftovers of a publish that was cut off, goes after a grace time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from longshore.types import JobRef
from longshore.weight_store import layout
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import StoredObject

# A publish that is under way has its bytes in place before its manifest.
GRACE_S = 600.0


def removable(
    job: JobRef,
    listing: Sequence[StoredObject],
    keep: int,
    named: set[VersionKey],
    now: float,
    assets_of: Callable[[VersionKey], str],
) -> list[str]:
    """Paths to delete, in order: a crash half way leaves no version whose parts are missing.

    Args:
        listing: every object of the job.
        keep: newest versions kept, per weight set.
        named: versions that pointers hold.
        now: Unix seconds.
        assets_of: hex name of a version's asset bundle; asked only when there is more than one bundle.
    """
    manifests = {key: item for item in listing if (key := _manifest_of(job, item.path))}
    kept = _newest(list(manifests), keep) | (named & manifests.keys())
    retired = manifests.keys() - kept
    gone = [manifests[key].path for key in sorted(retired)]

    live, dropped = set(), set()
    for item in listing:
        key = layout.version_of(job, item.path)
        if key is None or item.path.endswith("/manifest"):
            continue
        if key in retired or (key not in kept and _expired(item, now)):
            gone.append(item.path)
            dropped.add(_name(item.path))
        else:
            live.add(_name(item.path))

    root = layout.job_prefix(job)
    for item in _below(listing, f"{root}/blobs/"):
        if _name(item.path) not in live and (_name(item.path) in dropped or _expired(item, now)):
            gone.append(item.path)
    bundles = _below(listing, f"{root}/assets/")
    if len(bundles) > 1:
        used = {assets_of(key) for key in kept}
        gone += [item.path for item in bundles if _name(item.path) not in used and _expired(item, now)]
    return gone


def _newest(keys: list[VersionKey], keep: int) -> set[VersionKey]:
    found = set()
    for weight_set in {key.weight_set for key in keys}:
        found |= set(sorted((key for key in keys if key.weight_set == weight_set), reverse=True)[:keep])
    return found


def _manifest_of(job: JobRef, path: str) -> VersionKey | None:
    return layout.version_of(job, path) if path.endswith("/manifest") else None


def _below(listing: Sequence[StoredObject], prefix: str) -> list[StoredObject]:
    return [item for item in listing if item.path.startswith(prefix)]


def _name(path: str) -> str:
    return PurePosixPath(path).name


def _expired(item: StoredObject, now: float) -> bool:
    return now - item.modified_at > GRACE_S
