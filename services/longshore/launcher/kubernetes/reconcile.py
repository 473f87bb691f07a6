"""What is wanted of a cluster against what is seen in it: which acts lead from one to the other. Pure.

Wanted objects are named by kind and name. One is applied when it is missing, when its hash is another than what it
was made with (another plan, image or setting), or when it is no more as it was after our last apply: whatever anybody
has changed in it since is drift. Who starts anew knows of no last apply, and applies everything once, which changes
nothing where nothing differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from longshore.launcher.kubernetes.wanted import HASH_ANNOTATION, JOB_LABEL, Manifest

# Kind, name.
Key = tuple[str, str]
# Their pod template can't be changed: they are made anew. A learner that is stopped writes a checkpoint.
REPLACED = frozenset({"Job", "JobSet"})
# Conditions of a Job, and of a JobSet, that has ended.
ENDS = frozenset({"Complete", "Completed", "Failed"})
# Fixed once made: a claim that is larger or elsewhere is another claim.
KEPT = frozenset({"PersistentVolumeClaim"})
# What the launcher looks at and does not make.
_OBSERVED = frozenset({"Pod"})
# Parts of an object that say how it is, or where it is kept.
_PASSING = frozenset({"apiVersion", "kind", "metadata", "status"})


@dataclass(frozen=True)
class Mark:
    """What an object looked like after our last apply: another mark means that somebody else wrote to it."""

    uid: str
    content: str


@dataclass(frozen=True)
class Acts:
    """In this order: deletes, then applies."""

    deletes: tuple[Key, ...] = ()
    applies: tuple[Manifest, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.deletes or self.applies)


def key_of(manifest: Manifest) -> Key:
    return manifest["kind"], manifest["metadata"]["name"]


def mark_of(seen: Manifest) -> Mark:
    """Of all that an object shall be, and nothing of what it is like at the moment."""
    meta = seen["metadata"]
    lasting: Manifest = {name: value for name, value in seen.items() if name not in _PASSING}
    lasting |= {name: meta.get(name) for name in ("labels", "ownerReferences")}
    return Mark(meta["uid"], hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest())


def acts(
    wanted: Iterable[Manifest],
    seen: Mapping[Key, Manifest],
    marks: Mapping[Key, Mark],
    jobs: Collection[tuple[str, str]],
    job_of: Mapping[Key, tuple[str, str]],
) -> Acts:
    """
    Args:
        wanted: of every job that shall run, in the order in which they are made.
        seen: every object of ours in the cluster, with those that nobody wants.
        jobs: (job, site) that are wanted; objects of others are somebody else's to remove.
        job_of: (job, site) of what is seen.
    """
    deletes: list[Key] = []
    applies: list[Manifest] = []
    known: set[Key] = set()
    for manifest in wanted:
        key = key_of(manifest)
        known.add(key)
        found = seen.get(key)
        if found is None:
            applies.append(manifest)
        elif found["metadata"].get("deletionTimestamp"):
            # It is on its way out; the next look finds it gone.
            continue
        elif _made_with(found) != _made_with(manifest):
            if key[0] in REPLACED:
                # One that has ended says how; it is not to run once more for a new image's sake.
                deletes += [] if _has_ended(found) else [key]
            elif key[0] not in KEPT:
                applies.append(manifest)
        elif marks.get(key) != mark_of(found) and key[0] not in KEPT:
            applies.append(manifest)
    for key in seen:
        if key not in known and key[0] not in _OBSERVED and job_of.get(key) in jobs and not _goes(seen[key]):
            deletes.append(key)
    return Acts(tuple(deletes), tuple(applies))


def job_site(seen: Manifest) -> tuple[str, str]:
    """(job, site) of an object, by its labels; ("", "") of one that has none."""
    labels = seen["metadata"].get("labels") or {}
    return labels.get(JOB_LABEL, ""), labels.get("longshore.dev/site", "")


def _made_with(manifest: Manifest) -> str:
    return str((manifest["metadata"].get("annotations") or {}).get(HASH_ANNOTATION, ""))


def _has_ended(seen: Manifest) -> bool:
    conditions = (seen.get("status") or {}).get("conditions") or ()
    return any(one["type"] in ENDS and one.get("status") == "True" for one in conditions)


def _goes(seen: Manifest) -> bool:
    # What has an owner of its own (a ReplicaSet's, a Job's pods) goes with that.
    return bool(seen["metadata"].get("deletionTimestamp"))
