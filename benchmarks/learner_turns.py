"""Two sides of benchmarks/learner.py that take train steps in turns, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType

from benchmarks.learner_load import Load, make_load, make_model

# A side must be ready, and a step done, within this long.
DEADLINE_S = 900.0


@dataclass(frozen=True)
class Course:
    """What a side trains: `micro` is TRL's sequences in a forward pass, `pack_tokens` Longshore's token budget."""

    model: str
    groups: int
    micro: int = 8
    pack_tokens: int = 4096
    threads: int = 2

    @property
    def load(self) -> Load:
        return make_load(self.model, self.groups)


class Side:
    """One side, "longshore" or "trl", from the outside. Use as a context manager: it ends its process."""

    def __init__(self, name: str, course: Course) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(name, course, theirs), daemon=True)
        self.times: list[float] = []
        # Bytes of the process at the most, and before its first step.
        self.peak = self.before = 0

    def __enter__(self) -> Side:
        self._process.start()
        self.before = self._told()[1]
        return self

    def step(self) -> float:
        """Lets the side take a step; returns its seconds."""
        self._pipe.send(True)
        took, self.peak = self._told()
        self.times.append(took)
        return took

    def _told(self) -> tuple[float, int]:
        if not self._pipe.poll(DEADLINE_S):
            raise TimeoutError(f"a side said nothing for {DEADLINE_S:.0f} s")
        try:
            told: tuple[float, int] = self._pipe.recv()
        except EOFError:
            self._process.join(30)
            raise RuntimeError(
                f"a side ended by itself: exit code {self._process.exitcode} (-9: out of memory)"
            ) from None
        return told

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._pipe.send(False)
            self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


@dataclass
class _Turns:
    """The side's end: called between two steps, it tells how long the last one took and waits for the next."""

    pipe: Connection
    began: float | None = field(default=None)

    def __call__(self) -> bool:
        took = 0.0 if self.began is None else time.perf_counter() - self.began
        self.pipe.send((took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        go: bool = self.pipe.recv()
        self.began = time.perf_counter()
        return go


def _run(name: str, course: Course, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(course.threads)
    turns = _Turns(pipe)
    if name == "trl":
        from benchmarks import learner_trl

        learner_trl.train(course.model, course.load, course.micro, turns)
    else:
        _train(course, turns)


def _train(course: Course, turns: _Turns) -> None:
    from longshore.config import TrainSpec
    from longshore.learner.trainer import Trainer

    document = {
        "steps": 10_000,
        "learning_rate": 1e-6,
        "objective": {"name": "dapo"},
        "compute": {"pack_tokens": course.pack_tokens},
    }
    trainer = Trainer(make_model(course.model), TrainSpec.model_validate(document))
    sequences, number = course.load.sequences(), 0
    while turns():
        number += 1
        trainer.step(number, sequences, 0)
