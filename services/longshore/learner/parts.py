"""What the parts of one learner incarnation share; `service.py` puts it together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from longshore.config import JobSpec
from longshore.learner.broker_link import BrokerLink
from longshore.learner.curriculum import Curriculum
from longshore.learner.difficulty import TaskBook
from longshore.learner.intake import Intake
from longshore.learner.ledger import Ledger
from longshore.learner.progress import Progress
from longshore.learner.prompts import Prompts
from longshore.learner.publisher import Publisher
from longshore.learner.replay.buffer import ReplayBuffer
from longshore.learner.reporter import Reporter
from longshore.learner.trainer import Trainer
from longshore.tasks.source import TrainCursor
from longshore.types import JobRef, Task


@dataclass
class Parts:
    """One job's books, its policy, and the ways to the other services."""

    job: JobRef
    spec: JobSpec
    run_dir: Path
    link: BrokerLink
    publisher: Publisher
    trainer: Trainer
    ledger: Ledger
    intake: Intake
    progress: Progress
    cursor: TrainCursor
    heldout: list[Task]
    reporter: Reporter
    stop: asyncio.Event
    # Bytes of rollouts that were trained on and are in no durable checkpoint: more, and a checkpoint is made early.
    max_unacknowledged: int
    # None: rollouts carry their prompts.
    prompts: Prompts | None = None
    tasks_known: TaskBook = field(default_factory=TaskBook)
    # None: tasks are taken in the order of the source.
    curriculum: Curriculum | None = None
    # None: rollouts are trained on once.
    replay: ReplayBuffer | None = None
