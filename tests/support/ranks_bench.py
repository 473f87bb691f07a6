"""A learner's train steps without its broker, in one process or in several: `play` here, `play_in` over gloo.

Run as a program it is one rank: `ranks_bench.py SCENARIO OUT`, with torchrun's variables.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from builders import rollout
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from longshore.config import JobSpec
from longshore.learner.checkpoint import load_newest, restore_snapshot, take_snapshot, write_checkpoint
from longshore.learner.lora import from_published
from longshore.learner.model import save_checkpoint
from longshore.learner.published import published
from longshore.learner.ranks.environment import RENDEZVOUS
from longshore.learner.ranks.follower import Follower
from longshore.learner.ranks.ranks import ALONE, END, Ranks, join
from longshore.learner.sequences import Credit, TrainSequence, sequences_of
from longshore.learner.trainer import Trainer
from longshore.learner.warm_start import warm_start

VOCABULARY = 90
CANARY = [5, 6, 9, 7, 8, 1]
LIMIT_S = 1200


@dataclass(frozen=True)
class Scenario:
    """What a learner goes through."""

    # Of `train` in a JobSpec.
    train: dict[str, object]
    # The first and the last train step.
    first: int = 1
    last: int = 3
    groups: int = 2
    tied: bool = True
    # Checkpoints are read from it before the first step, and written to it after the last.
    read: str = ""
    write: str = ""
    # The trained model is written to it.
    save: str = ""
    warm_start: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Played:
    """Metrics of each step, weights after the last one, and what would be published."""

    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    canary: list[float]
    warm_losses: list[float]


def policy(tied: bool) -> LlamaForCausalLM:
    """A small decoder; its vocabulary, 90 rows, and its layers are not shared out evenly among four."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=66,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).float().train()


def batch(groups: int, step: int) -> list[TrainSequence]:
    """Groups of five with a shared prompt each and replies of very different lengths."""
    made: list[TrainSequence] = []
    for group in range(groups):
        prompt = _tokens(30 + 7 * group, 100 * step + group)
        for member, length in enumerate((30, 1, 90, 12, 2)):
            seed = 1000 * step + 10 * group + member
            one = rollout(group, member, prompt=prompt, reply=_tokens(length, seed), logprobs=(-2.5,) * length)
            credit = Credit([(-0.9) ** (member + index) for index in range(one.num_sampled)], [0.1] * one.num_sampled)
            made += sequences_of(one, credit, 5 * group + member, group, use=1 + member % 2)
    return made


def play(scenario: Scenario, ranks: Ranks = ALONE) -> Played:
    """Goes through a scenario; the leader's part of it."""
    spec = _spec(scenario)
    model = policy(scenario.tied)
    with ranks.command("build", {"config": model.config.to_dict(), "seed": spec.seed}):
        trainer = Trainer(model, spec.train, spec.max_sampled, spec.seed, ranks)
    losses: list[float] = []
    if spec.warm_start is not None:
        examples = iter([[3, *_tokens(3 + seed % 5 + 3, seed)] for seed in range(200)])
        with ranks.command("warm_start", spec.warm_start.model_dump(mode="json")):
            warm_start(model, examples, spec.warm_start, lambda _, loss: losses.append(loss) is None, ranks)
    if scenario.read:
        snapshot = load_newest(Path(scenario.read), tensors=ranks.size == 1)
        assert snapshot is not None
        restore_snapshot(trainer, snapshot)
    metrics = [
        trainer.step(step, batch(scenario.groups, step), step - 1) for step in range(scenario.first, scenario.last + 1)
    ]
    told = {"dtype": "bfloat16", "canary": CANARY}
    with ranks.command("publish", told):
        canary = published(model, "bfloat16", CANARY, ranks=ranks).canary.logprobs
    # Published as float32 they are the weights themselves.
    with ranks.command("publish", {**told, "dtype": "float32"}):
        tensors = published(model, "float32", CANARY, ranks=ranks).tensors
    weights = {one.name: from_published(one).clone() for one in tensors}
    if scenario.write:
        write_checkpoint(Path(scenario.write), take_snapshot(trainer, scenario.last, {"epoch": 1}))
    if scenario.save:
        folder = Path(scenario.save)
        with ranks.command("save", {"folder": str(folder)}):
            save_checkpoint(model, {}, folder / "checkpoint", ranks)
            if trainer.adapters is not None:
                trainer.adapters.save(folder / "adapter", ranks)
    return Played(metrics, weights, list(canary), losses)


def play_in(processes: int, scenarios: Sequence[Scenario]) -> list[Played]:
    """The same in several processes, the first of which leads; one scenario after another."""
    with tempfile.TemporaryDirectory(prefix="longshore-ranks-") as name:
        folder = Path(name)
        (folder / "scenarios.json").write_text(json.dumps([dataclasses.asdict(scenario) for scenario in scenarios]))
        argv = [sys.executable, __file__, str(folder / "scenarios.json"), str(folder / "out")]
        running = []
        for rank in range(processes):
            env = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "RANK": str(rank),
                "WORLD_SIZE": str(processes),
                RENDEZVOUS: (folder / "ranks").as_uri(),
                "OMP_NUM_THREADS": "1",
            }
            with (folder / f"{rank}.log").open("wb") as log:
                running.append(subprocess.Popen(argv, env=env, stdout=log, stderr=log))
        try:
            codes = [process.wait(LIMIT_S) for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        said = "\n".join((folder / f"{rank}.log").read_text()[-4000:] for rank in range(processes))
        assert codes == [0] * processes, said
        return [_read(folder / "out" / str(number)) for number in range(len(scenarios))]


def _spec(scenario: Scenario) -> JobSpec:
    document = {
        "name": "ranks",
        "tasks": {"source": "jsonl"},
        "verifier": {"name": "exact-match"},
        "train": {"steps": 10, **scenario.train},
        "warm_start": scenario.warm_start or None,
    }
    return JobSpec.model_validate(document)


def _tokens(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def _write(played: Played, folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file(played.weights, folder / "weights.safetensors")
    told = {"metrics": played.metrics, "canary": played.canary, "warm_losses": played.warm_losses}
    told["names"] = list(played.weights)
    (folder / "played.json").write_text(json.dumps(told))


def _read(folder: Path) -> Played:
    told = json.loads((folder / "played.json").read_text())
    found = load_file(folder / "weights.safetensors")
    return Played(weights={name: found[name] for name in told.pop("names")}, **told)


def main(scenarios_file: str, out: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    ranks = join(int(os.environ["WORLD_SIZE"]), "cpu")
    for number, document in enumerate(json.loads(Path(scenarios_file).read_text())):
        scenario = Scenario(**document)
        if not ranks.is_leader:
            Follower(ranks, _spec(scenario)).run()
            continue
        played = play(scenario, ranks)
        with ranks.command(END):
            _write(played, Path(out) / str(number))


if __name__ == "__main__":
    main(*sys.argv[1:])
