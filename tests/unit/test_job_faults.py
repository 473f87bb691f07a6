"""A JobSpec's faults: each of them, by its path, with what is allowed."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from longshore.config import Json, load_job, parse_job, parse_what_stands
from longshore.config_model import HubModel
from longshore.errors import Fault, InvalidJobSpec

GOOD: Json = {
    "name": "j",
    "tasks": {"source": "reasoning-gym", "dataset": "chain_sum"},
    "verifier": {"name": "reasoning-gym"},
    "train": {"steps": 3},
}


def faults(**parts: object) -> list[str]:
    """Of the good document with other parts, as text without the values."""
    spec, found = parse_what_stands(GOOD | parts)
    assert spec is not None
    return [f"{fault.path}: {fault.message}" for fault in found]


def test_the_good_one_has_none() -> None:
    assert faults() == []


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"name": "Not A Name"}, "name: must be 1-40 characters of a-z, 0-9 and -"),
        ({"seed": True}, "seed: must be a number"),
        ({"train": {"steps": 3, "learning_rate": True}}, "train.learning_rate: must be a number"),
        ({"train": {"steps": 3, "max_grad_norm": float("inf")}}, "train.max_grad_norm: must be a finite number"),
        ({"train": {"steps": 3, 7: 1}}, "train.7: a key must be a string; put it in quotes"),
        (
            {"train": {"steps": 3, "objective": {"name": "nope"}}},
            "train.objective.name: must be one of dppo, reinforce",
        ),
        ({"train": {"steps": 3, "objective": {}}}, "train.objective.name: must be one of dppo, reinforce"),
        ({"model": {"kind": "blob"}}, "model.kind: must be one of new, directory"),
        ({"model": {"layers": 2}}, "model.kind: must be one of new, directory"),
        ({"model": {"kind": "directory"}}, "model.path: is required"),
        ({"model": {"kind": "directory", "path": 5}}, "model.path: must be a path in a string"),
        ({"model": {"kind": "new", "hidden_size": 100}}, "model.hidden_size: must be a multiple of 2 * heads (8)"),
        ({"model": {"kind": "new", "kv_heads": 3}}, "model.kv_heads: must divide heads 4"),
        ({"evaluation": None}, "evaluation: must be a mapping with keys of: every, tasks"),
        ({"evaluation": {"task": 1}}, "evaluation.task: unknown key; allowed here: every, tasks"),
        ({"evaluation": {"every": 5}}, "evaluation.every: needs evaluation.tasks > 0: there is nothing to evaluate"),
        ({"sampling": {"max_new_tokens": 64}}, "sampling.max_new_tokens: must be below model.max_context 64: "),
        ({"environment": {"max_turns": 2}}, "environment.max_turns: must be 1 with environment.name single-turn"),
        ({"train": {"steps": 3, "warmup_steps": 4}}, "train.warmup_steps: must not exceed train.steps 3"),
        ({"generator": {"engine": "trt"}}, "generator.engine: Input should be 'torch' or 'vllm'"),
        ({"generator": {"dtype": "bfloat16"}}, "generator.dtype: must be float32 with engine torch"),
        ({"generator": {"tensor_parallel": 2}}, "generator.tensor_parallel: must be 1 with engine torch"),
        (
            {"generator": {"engine": "vllm"}, "sampling": {"temperature": 2.5}},
            "sampling.temperature: must lie in 0.01..2 with generator.engine vllm",
        ),
        (
            {"generator": {"engine": "vllm"}, "evaluation": {"tasks": 9, "every": 5}},
            "evaluation.every: must be 0 with generator.engine vllm",
        ),
        ({"name": "a\ud800"}, "name: must be text without zero bytes and half characters"),
    ],
)
def test_one_fault(parts: Json, says: str) -> None:
    (fault,) = faults(**parts)
    assert fault.startswith(says)


def test_nothing_hides_behind_anything_else() -> None:
    found = faults(
        name="Not A Name",
        seeed=1,
        seed=-1,
        model={"kind": "new", "hidden_size": 100, "kv_heads": 3, "max_context": 32},
        tasks={"source": "jsonl", "heldout_fraction": 0},
        environment={"max_turns": 2},
        sampling={"max_new_tokens": 40, "temperature": 0},
        train={"steps": 3, "warmup_steps": 4, "objective": {"name": "nope"}},
        evaluation={"tasks": 5},
        resources={"actors": 0},
    )
    assert {fault.split(": ")[0] for fault in found} == {
        "name",
        "seeed",
        "seed",
        "model.hidden_size",
        "model.kv_heads",
        "environment.max_turns",
        "sampling.max_new_tokens",
        "sampling.temperature",
        "train.warmup_steps",
        "train.objective.name",
        "evaluation.tasks",
        "resources.actors",
    }


def test_a_part_that_is_wrong_is_not_held_against_others() -> None:
    # What stands in for the wrong parts does not fit the others; that is nobody's fault.
    assert faults(model={"kind": "new", "max_context": "x"}, sampling={"max_new_tokens": 100}) == [
        "model.max_context: Input should be a valid integer, unable to parse string as an integer"
    ]
    assert [fault.split(": ")[0] for fault in faults(train={"steps": 0, "warmup_steps": 5})] == ["train.steps"]
    assert [fault.split(": ")[0] for fault in faults(sites=[{"nam": "x"}], resources={"actors": 0})] == [
        "sites.0.name",
        "sites.0.nam",
    ]


def test_what_is_missing_is_told_though_the_rest_is_looked_at() -> None:
    spec, found = parse_what_stands({"tasks": {"source": "jsonl"}, "evaluation": {"tasks": -1}})
    assert spec is not None
    assert {fault.path for fault in found} == {"name", "verifier", "train", "evaluation.tasks"}
    spec, found = parse_what_stands({"name": "x"})
    assert spec is None
    assert {fault.path for fault in found} == {"tasks", "verifier", "train"}


def test_thousands_of_faults_are_all_found() -> None:
    with pytest.raises(InvalidJobSpec) as caught:
        parse_job(GOOD | {f"k{index}": 1 for index in range(50_000)} | dict.fromkeys(range(1000), 1))
    assert len(caught.value.faults) == 51_000


def test_a_value_of_any_size_is_shown_short() -> None:
    value: object = "x"
    for _ in range(12):
        value = [value] * 9
    # Written out, this one would fill every memory.
    assert len(str(Fault("a", value, "wrong"))) < 120


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b\n", "line 2, column 1: the key 'name' is there twice"),
        ("a: " + "[" * 5000, "deeper than 64 levels"),
        ("a: 2020-13-45\n", "month must be in 1..12"),
        ("a: &x [1]\nb: *x\n", "uses YAML aliases"),
        ("x" * (1024 * 1024 + 1), "is larger than 1048576 bytes"),
        ("hello\n", "must be a mapping of keys"),
    ],
)
def test_files_that_are_no_job(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(InvalidJobSpec) as caught:
        load_job(file)
    assert says in str(caught.value)


def test_paths_are_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    file = tmp_path / "job.yaml"
    file.write_text("tasks: {path: sub/x.jsonl}\nmodel: {path: loop}\n", encoding="utf-8-sig")
    document = load_job(file)
    assert document == {"tasks": {"path": f"{tmp_path}/sub/x.jsonl"}, "model": {"path": f"{tmp_path}/loop"}}
    file.write_text('tasks: {path: "a\\0b"}\n')
    assert load_job(file) == {"tasks": {"path": "a\0b"}}


@pytest.mark.parametrize(
    "where",
    [
        {"name": ".."},
        {"name": "../x"},
        {"name": "x/.y"},
        {"revision": ".."},
        {"revision": "refs/../../../other-job/checkpoint"},
        {"revision": "/etc/passwd"},
        {"revision": "a//b"},
        {"revision": "a" * 129},
    ],
)
def test_names_at_the_hub_lead_nowhere_else(where: dict[str, str]) -> None:
    """They become paths in the hub's cache, which lies beside other projects' files."""
    with pytest.raises(pydantic.ValidationError):
        HubModel.model_validate({"kind": "hub", "name": "Qwen/Qwen3-0.6B", **where})
    for revision in ("main", "refs/pr/7", "v1.0", "0a1b2c"):
        HubModel.model_validate({"kind": "hub", "name": "openai-community/gpt2", "revision": revision})
