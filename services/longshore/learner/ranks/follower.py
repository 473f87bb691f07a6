"""A rank that follows: it holds its share of the policy, and does what the leader says until the leader ends.

It speaks to nothing but the other ranks. What is received between them are tensors and JSON (messages.py).
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from longshore.config import JobSpec, WarmStartSpec
from longshore.errors import ConfigError, Unavailable
from longshore.learner.checkpoint import copied_state, read_shares
from longshore.learner.config import LearnerSettings
from longshore.learner.model import save_checkpoint
from longshore.learner.published import probe, published
from longshore.learner.ranks.messages import Json, Message
from longshore.learner.ranks.ranks import END, Ranks, join
from longshore.learner.ranks.sharding import skeleton
from longshore.learner.ranks.shards import ShardWriter
from longshore.learner.ranks.work import STEP, from_message
from longshore.learner.trainer import Trainer
from longshore.learner.warm_start import warm_start
from longshore.telemetry.log import configure_logging

log = structlog.get_logger()

# Exit code of a process that cannot work with the settings that it was given (rpc/process.py).
WRONG_SETTINGS = 2


def follow(settings: LearnerSettings) -> int:
    """Runs one following rank to the leader's end and returns its exit code."""
    # Who stops us tells the leader as well, who still needs us for its last checkpoint.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        configure_logging("learner", settings.name, settings.log_level)
        job = settings.load_job()
        torch.set_num_threads(job.spec.resources.threads)
        train = job.spec.train
        Follower(join(train.processes, train.compute.device), job.spec).run()
    except ConfigError as error:
        log.error("cannot start", reason=str(error))
        return WRONG_SETTINGS
    except Unavailable:
        # The leader has said why it ended; nothing of ours shall stand behind that in the log.
        return 1
    return 0


class Follower:
    """One following rank. `run` returns when the leader has ended, and raises Unavailable when it is gone."""

    def __init__(self, ranks: Ranks, spec: JobSpec) -> None:
        self._ranks = ranks
        self._spec = spec
        self._trainer: Trainer | None = None
        self._writer = ShardWriter(ranks)
        self._orders: dict[str, Callable[[Trainer, Message], None]] = {
            STEP: lambda trainer, message: _ignore(trainer.take_part(from_message(message))),
            "warm_start": self._warm_start,
            "publish": self._publish,
            "probe": self._probe,
            "snapshot": self._snapshot,
            "write": lambda _, message: self._writer.begin(Path(_text(message.told, "path"))),
            "restore": lambda trainer, message: read_shares(trainer, Path(_text(message.told, "path"))),
            "save": self._save,
        }

    def run(self) -> None:
        """Obeys until the end."""
        while (message := self._ranks.heard()).kind != END:
            if message.kind == "build":
                self._build(message)
                continue
            assert self._trainer is not None
            self._orders[message.kind](self._trainer, message)
        self._writer.wait()

    def _build(self, message: Message) -> None:
        config, seed = message.told["config"], message.told["seed"]
        assert isinstance(config, dict)
        assert isinstance(seed, int)
        policy = skeleton(config)
        self._trainer = Trainer(policy, self._spec.train, self._spec.max_sampled, seed, self._ranks)

    def _warm_start(self, trainer: Trainer, message: Message) -> None:
        spec = WarmStartSpec.model_validate(message.told)
        warm_start(trainer.policy, iter(()), spec, lambda *_: True, self._ranks)

    def _publish(self, trainer: Trainer, message: Message) -> None:
        published(trainer.policy, _text(message.told, "dtype"), _tokens(message.told), ranks=self._ranks)

    def _probe(self, trainer: Trainer, message: Message) -> None:
        probe(trainer.policy, (), _tokens(message.told))

    def _snapshot(self, trainer: Trainer, message: Message) -> None:
        del message
        _, shares = copied_state(trainer)
        self._writer.take(shares)

    def _save(self, trainer: Trainer, message: Message) -> None:
        folder = Path(_text(message.told, "folder"))
        save_checkpoint(trainer.policy, {}, folder / "checkpoint", self._ranks)
        if trainer.adapters is not None:
            trainer.adapters.save(folder / "adapter", self._ranks)


def _text(told: Json, name: str) -> str:
    value = told[name]
    assert isinstance(value, str)
    return value


def _tokens(told: Json) -> list[int]:
    canary = told["canary"]
    assert isinstance(canary, list)
    return canary


def _ignore(_: object) -> None: ...
