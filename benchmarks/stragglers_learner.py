"""The learner of benchmarks/stragglers.py: the real loop and books over the real broker, with a simulated edge.

Real: admission, ledger, issue and batch records, intake with all its checks, broker link, checkpoints, reports.
Simulated: a train step sleeps, and a published version is a number in a file that the actors read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.stragglers_load import Course, Load, Watch
from benchmarks.stragglers_site import write_version
from longshore.config import JobSpec, TasksSpec
from longshore.learner.batch_log import BatchLog
from longshore.learner.broker_link import BrokerLink
from longshore.learner.intake import Intake, Limits
from longshore.learner.ledger import Ledger
from longshore.learner.loop import LearnerLoop
from longshore.learner.parts import Parts
from longshore.learner.progress import Progress
from longshore.learner.publisher import Lineage, Publisher
from longshore.learner.reporter import Reporter
from longshore.learner.sequences import TrainSequence
from longshore.learner.trainer import Trainer
from longshore.rollout_queue import broker
from longshore.rollout_queue.ledger import LedgerCounts
from longshore.tasks.source import TrainCursor
from longshore.types import JobRef, Message, Task, Ticket, TicketRef

MAX_ATTEMPTS = 5
UNACKNOWLEDGED_BYTES = 256 * 1024 * 1024


class _Tasks:
    """An endless source of tasks without a meaning."""

    version = "1"
    size: int | None = None

    def __init__(self, spec: TasksSpec | None = None, seed: int = 0, environment: str = "single-turn") -> None: ...

    def task(self, ordinal: int) -> Task:
        return Task(str(ordinal), (Message("user", f"Task {ordinal}"),), environment="single-turn")


def _policy() -> LlamaForCausalLM:
    shape = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))


class _Trainer(Trainer):
    """A step takes its time and no processor; which rollouts it had, and how stale they were, is written down."""

    def __init__(self, spec: JobSpec, load: Load, course: Course) -> None:
        super().__init__(_policy(), spec.train)
        self._load = load
        self._course = course

    def step(self, number: int, sequences: Sequence[TrainSequence], policy_version: int) -> dict[str, float]:
        time.sleep(self._load.train_s)
        self._course.ended.append(time.monotonic())
        for sequence in sequences:
            oldest = min(v for v, sampled in zip(sequence.versions, sequence.sampled, strict=True) if sampled)
            self._course.staleness.append(policy_version - oldest)
        return {"loss/policy": 0.0}


class _Publisher(Publisher):
    """A version is out as soon as its number is."""

    def __init__(self, version_file: Path, batch: int, watch: Watch) -> None:
        self._file = version_file
        self._batch = batch
        self._watch = watch
        self._taken = 0

    async def publish(self, policy: LlamaForCausalLM, version: int, lineage: Lineage, *, pinned: bool = False) -> int:
        del pinned
        write_version(self._file, version)
        self._watch.consume(self._batch)
        self._taken = version
        return version

    async def wait(self) -> None: ...


class _Link(BrokerLink):
    """Counts every ticket when it goes out for the first time."""

    def watch(self, watch: Watch) -> None:
        self._watch = watch
        self._seen: set[str] = set()

    async def issue(self, tickets: Sequence[Ticket]) -> None:
        new = {ticket.ref.key for ticket in tickets} - self._seen
        self._seen |= new
        self._watch.issue(len(new))
        await super().issue(tickets)


@dataclass(frozen=True)
class Learned:
    """What came of a run."""

    course: Course
    watch: Watch
    counts: LedgerCounts
    ledger: Ledger
    # When the first ticket was due, on the monotonic clock.
    began: float


async def learn(load: Load, url: str, job: JobRef, folder: Path, version_file: Path) -> Learned:
    """Runs a load's job from its first ticket to its last train step, beside a site that makes its rollouts."""
    spec, course, watch = _spec(load, job), Course(), Watch(load.limit)
    (folder / "learner" / "checkpoints").mkdir(parents=True)
    client = broker.connect(url)
    link = _Link(client, job, "home", MAX_ATTEMPTS, spec.resources.site_lease_s)
    link.watch(watch)
    ledger = Ledger()
    intake = Intake(link, ledger, job, Limits(vocab_size=64, max_context=64, max_sampled=16, temperature=1.0))
    try:
        await link.open(at_least=1)
        parts = Parts(
            job=job,
            spec=spec,
            run_dir=folder,
            link=link,
            publisher=_Publisher(version_file, load.batch, watch),
            trainer=_Trainer(spec, load, course),
            ledger=ledger,
            intake=intake,
            progress=Progress(started_at=time.time()),
            cursor=TrainCursor(_Tasks(), 0.0),
            heldout=[],
            reporter=Reporter(job, spec, folder, link.publish),
            stop=asyncio.Event(),
            max_unacknowledged=UNACKNOWLEDGED_BYTES,
        )
        began = time.monotonic()
        await LearnerLoop(parts).run()
        counts = await link.counts()
    finally:
        await client.aclose()
    course.trained = [
        [load.number(TicketRef(job, group, index)) for group, index in record.members]
        for record in BatchLog(folder / "learner" / "batches.jsonl").after(0)
    ]
    return Learned(course, watch, counts, ledger, began)


def _spec(load: Load, job: JobRef) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": job.job,
            "tasks": {"source": "simulated", "heldout_fraction": 0.0},
            "verifier": {"name": "simulated"},
            "train": {
                "steps": load.steps,
                "groups_per_step": load.groups_per_step,
                "group_size": load.group_size,
                "target_staleness": load.target_staleness,
                "checkpoint_every": 10,
            },
        }
    )
