"""Watches what a job's learner leaves on disk as it appears: batch records, checkpoints, published versions.

Everything that was ever seen is kept, though the learner may cut, replace or retire it later.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import google.protobuf.message

from longshore.proto.v1 import weights_pb2

POLL_S = 0.25


@dataclass(frozen=True)
class Record:
    """A batch record. Example: Record(7, 2, (12, 9), ("12.0", "12.1", "9.0"))"""

    step: int
    epoch: int
    groups: tuple[int, ...]
    # Rollouts that are trained on for the first time.
    uses: tuple[str, ...]
    # (rollout, use) of those that are replayed.
    again: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class CheckpointFacts:
    """What a durable checkpoint says of tickets. `ends`: of those that ended lately, by key."""

    number: int
    step: int
    epoch: int
    issued: int
    outcomes: dict[str, int]
    open_tickets: int
    ends: dict[str, str]
    # "outcome@site" -> number.
    by_site: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class VersionFacts:
    """A published manifest."""

    version: int
    step: int
    epoch: int
    parent: int | None


@dataclass
class LearnerFacts:
    """Everything that was seen of one job's learner."""

    records: list[Record] = field(default_factory=list)
    # Moment (monotonic) at which a step was first seen recorded.
    first_recorded: dict[int, float] = field(default_factory=dict)
    checkpoints: dict[int, CheckpointFacts] = field(default_factory=dict)
    versions: dict[int, VersionFacts] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


class LearnerTap:
    """Follows one job."""

    def __init__(self, run_dir: Path, store: Path) -> None:
        """`store` is the job's folder in the weight store."""
        self.facts = LearnerFacts()
        self._batches = run_dir / "learner" / "batches.jsonl"
        self._checkpoints = run_dir / "learner" / "checkpoints"
        self._versions = store / "versions" / "policy"
        self._read = 0
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="learner-tap", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns once everything has been looked at. Raises what kept it from looking."""
        self._stop.set()
        self._thread.join()
        if self.error is not None:
            raise self.error
        self._look()

    def _run(self) -> None:
        while self.error is None and not self._stop.wait(POLL_S):
            try:
                self._look()
            except Exception as error:
                # A log with holes would prove nothing: whoever runs the test has to hear of it.
                self.error = error

    def _look(self) -> None:
        self._look_at_batches()
        self._look_at_checkpoints()
        self._look_at_versions()

    def _look_at_batches(self) -> None:
        if not self._batches.exists():
            return
        with self._batches.open("rb") as file:
            if file.seek(0, 2) < self._read:
                self.facts.faults.append(f"{self._batches.name} lost whole lines")
                self._read = 0
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                record = record_of(line)
                self.facts.records.append(record)
                self.facts.first_recorded.setdefault(record.step, time.monotonic())

    def _look_at_checkpoints(self) -> None:
        for path in self._checkpoints.glob("checkpoint_*"):
            number = int(path.name.rpartition("_")[2])
            if number in self.facts.checkpoints:
                continue
            try:
                step = json.loads((path / "manifest.json").read_bytes())["step"]
                found = checkpoint_of(number, step, json.loads((path / "state.json").read_bytes()))
            except FileNotFoundError:
                # Removed just now, in favour of newer ones.
                continue
            self.facts.checkpoints[number] = found
            for key, outcome in found.ends.items():
                if self.facts.ends.setdefault(key, outcome) != outcome:
                    self.facts.faults.append(
                        f"ticket {key} ended as {self.facts.ends[key]} and, in checkpoint {number}, as {outcome}"
                    )

    def _look_at_versions(self) -> None:
        for path in self._versions.glob("*/manifest"):
            if int(path.parent.name) in self.facts.versions:
                continue
            try:
                found = version_of(path.read_bytes())
            except (FileNotFoundError, google.protobuf.message.DecodeError):
                # Retired, or still being written: an object store's file appears under its name when it is whole.
                continue
            self.facts.versions[found.version] = found


def record_of(line: bytes) -> Record:
    item = json.loads(line)
    uses: Sequence[tuple[str, int]] = item["uses"]
    return Record(
        item["step"],
        item["epoch"],
        tuple(item["groups"]),
        tuple(key for key, use in uses if use == 1),
        tuple((key, use) for key, use in uses if use != 1),
    )


def checkpoint_of(number: int, step: int, state: dict[str, object]) -> CheckpointFacts:
    ledger, epoch = state["ledger"], state["epoch"]
    assert isinstance(ledger, dict)
    assert isinstance(epoch, int)
    ends = {f"{group}.{index}": outcome for group, pairs in ledger["settled"] for index, outcome in pairs}
    outcomes = Counter[str]()
    by_site = {f"{outcome}@{site}": count for site, outcome, count in ledger["ends"]}
    for _, outcome, count in ledger["ends"]:
        outcomes[outcome] += count
    # A late group was trained on without those of its tickets that await a verdict.
    open_tickets = sum(group["size"] - len(group["ended"]) for group in [*ledger["open"], *ledger["late"]])
    return CheckpointFacts(number, step, epoch, ledger["issued"], dict(outcomes), open_tickets, ends, by_site)


def version_of(data: bytes) -> VersionFacts:
    header = weights_pb2.PublishHeader.FromString(data)
    manifest = weights_pb2.Manifest.FromString(header.manifest.manifest)
    lineage = manifest.lineage
    parent = lineage.parent_version if lineage.HasField("parent_version") else None
    return VersionFacts(manifest.version, lineage.train_step, lineage.learner_epoch, parent)
