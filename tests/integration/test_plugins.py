"""The example plug-ins, installed as a person would, through the real registry, episode and scoring process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_tokenizer import assets

from longshore.actor.episode import Reply, play
from longshore.actor.surroundings import EnvironmentFactory
from longshore.config import JobSpec, load_job, parse_job
from longshore.tasks import registry
from longshore.tasks.check import check_job
from longshore.tasks.rendering import Renderer
from longshore.tasks.source import TaskSource, TrainCursor, heldout_tasks
from longshore.types import EngineFingerprint, FinishReason, GivenSpan, SampledSpan, Sampling, Task
from longshore.verifier.pool import PoolLimits, VerifierPool

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "plugins"
ENGINE = EngineFingerprint("scripted", "1", "float32", "")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`pip install examples/plugins` into a folder of its own, on this process's and its children's path."""
    target = tmp_path_factory.mktemp("plugins") / "site"
    # Offline: hatchling comes from our own environment.
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*argv, "--target", str(target), str(PACKAGE)], check=True, timeout=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(target))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(target), str(ROOT / "services")]))
        yield target


@pytest.fixture
def spec(installed: Path) -> JobSpec:
    return parse_job(load_job(PACKAGE / "job.yaml"))


def make_source(spec: JobSpec) -> TaskSource:
    kind = registry.load(registry.SOURCES, spec.tasks.source)
    made: TaskSource = kind(spec.tasks, spec.seed, spec.environment.name)
    return made


class Guesses:
    """A model that says these."""

    def __init__(self, renderer: Renderer, *words: str) -> None:
        self._renderer = renderer
        self._words = list(words)
        self.prompts: list[str] = []

    async def __call__(self, token_ids: list[int], sampling: Sampling, turn: int) -> Reply:
        self.prompts.append(self._renderer.text(token_ids))
        ids = self._renderer.reply_ids(self._words[turn])
        return Reply(ids, [SampledSpan(turn, (-0.5,) * len(ids))], FinishReason.STOP, (ENGINE,))


def test_the_job_is_fine_where_they_are_installed(spec: JobSpec) -> None:
    assert check_job(spec) == []


def test_their_own_checks_are_asked(spec: JobSpec) -> None:
    document = spec.model_dump(mode="json")
    document["tasks"]["options"] = {"largest": "many"}
    document["environment"]["options"] = {"x": 1}
    document["verifier"]["options"] = {"scale": 0}
    assert [fault.path for fault in check_job(parse_job(document))] == [
        "environment.options",
        "verifier.options",
        "tasks.options.largest",
    ]


def test_the_source(spec: JobSpec) -> None:
    source = make_source(spec)
    cursor = TrainCursor(source, spec.tasks.heldout_fraction)
    heldout = {task.messages for task in heldout_tasks(source, spec.tasks.heldout_fraction, spec.evaluation.tasks)}
    trained = {cursor.next().messages for _ in range(200)}
    assert len(heldout) == spec.evaluation.tasks
    assert not heldout & trained
    task = source.task(5)
    assert task == make_source(spec).task(5)
    assert task is not None
    left, _, right = task.messages[0].content.removesuffix("=").partition("+")
    assert int(left) + int(right) == int(task.answer or "")


def a_task(spec: JobSpec, answer: int) -> Task:
    source = make_source(spec)
    tasks = (source.task(number) for number in range(1000))
    return next(task for task in tasks if task is not None and task.answer == str(answer))


@pytest.mark.parametrize(
    ("words", "finish", "reward"),
    [
        (["7"], FinishReason.ENVIRONMENT, 1.0),
        (["5", "9", "7"], FinishReason.ENVIRONMENT, 0.8),
        (["5", "9", "8"], FinishReason.TURNS, 1 / 1.2 - 0.2),
        (["what", "is", "this"], FinishReason.TURNS, 0.0),
    ],
)
async def test_a_rollout_from_task_to_reward(
    spec: JobSpec, words: list[str], finish: FinishReason, reward: float
) -> None:
    renderer, task = Renderer(assets()), a_task(spec, 7)
    environments = EnvironmentFactory(
        registry.load(registry.ENVIRONMENTS, spec.environment.name), spec.environment.options, 30
    )
    model = Guesses(renderer, *words)
    made = await play(task, Sampling(1.0, 4), spec.environment.max_turns, renderer, environments(), model)
    assert made.finish is finish
    assert len(made.turns) == len(words)
    assert [span.length for span in made.spans if isinstance(span, GivenSpan)] != []
    if words[0] == "5":
        assert "higher:" in model.prompts[1]
        assert "lower:" in model.prompts[2]
    limits = PoolLimits(workers=1, max_waiting=4, memory_bytes=2**31, start_s=60)
    async with VerifierPool(spec.verifier, limits) as pool:
        verdict = await pool.score(made.score_request(task))
    assert verdict.reward == pytest.approx(reward)
    assert verdict.verifier == "closeness@1"
    assert verdict.breakdown["turns"] == len(words)


def test_each_file_is_short() -> None:
    for path in (PACKAGE / "longshore_example_plugins").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60
