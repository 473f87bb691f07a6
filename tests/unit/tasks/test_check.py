"""What a gateway says of a job before it is accepted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from plugin_package import write_package

from longshore.config import JobSpec, load_job, parse_job
from longshore.errors import InvalidJobSpec, PluginError
from longshore.tasks import registry
from longshore.tasks.check import check_document, check_job

ROOT = Path(__file__).parents[3]


def job(**parts: object) -> JobSpec:
    document: dict[str, object] = {
        "name": "j",
        "tasks": {"source": "reasoning-gym", "dataset": "chain_sum"},
        "verifier": {"name": "reasoning-gym"},
        "train": {"steps": 1},
    }
    return parse_job(document | parts)


def faults(**parts: object) -> list[str]:
    return [f"{fault.path}: {fault.message}" for fault in check_job(job(**parts))]


def lines(path: Path, *records: dict[str, object]) -> dict[str, object]:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return {"source": "jsonl", "path": str(path)}


@pytest.mark.parametrize("example", ["first-light.yaml", "jsonl-math.yaml", "two-sites.yaml"])
def test_the_examples_are_fine(example: str) -> None:
    assert check_job(parse_job(load_job(ROOT / "examples" / example))) == []


@pytest.mark.parametrize("example", ["smollm2-needle.yaml", "smollm2-needle-lora.yaml"])
def test_the_examples_with_a_pretrained_model_are_fine_once_it_is_there(example: str, tmp_path: Path) -> None:
    document = load_job(ROOT / "examples" / example)
    model = document["model"]
    assert isinstance(model, dict)
    assert model["path"] == str(ROOT / "build" / "models" / "smollm2-135m-instruct")
    document["model"] = {**model, "path": str(tmp_path / "nowhere")}
    assert [fault.path for fault in check_job(parse_job(document))] == ["model.path"]


def test_everything_unknown_is_named_at_once() -> None:
    found = faults(
        tasks={"source": "nope"},
        verifier={"name": "nope"},
        environment={"name": "nope"},
        model={"kind": "directory", "path": "/does/not/exist"},
    )
    assert found == [
        "model.path: there is no such directory",
        "environment.name: environment 'nope' is not installed; installed: single-turn",
        "verifier.name: verifier 'nope' is not installed; installed: exact-match, reasoning-gym",
        "tasks.source: task source 'nope' is not installed; installed: jsonl, reasoning-gym",
    ]


def test_a_curriculum_needs_tasks_that_come_again(tmp_path: Path) -> None:
    endless: dict[str, object] = {"source": "reasoning-gym", "dataset": "chain_sum"}
    (fault,) = faults(tasks=endless | {"curriculum": {"target": 0.5}})
    assert fault.startswith("tasks.curriculum.pool: source reasoning-gym is endless")
    assert faults(tasks=endless | {"curriculum": {"pool": 500}}) == []
    file = lines(tmp_path / "t.jsonl", *({"prompt": f"{n}", "answer": "1"} for n in range(9)))
    assert faults(tasks=file | {"curriculum": {}}, verifier={"name": "exact-match"}) == []


def test_a_module_path_is_no_plugin_name() -> None:
    (fault,) = faults(verifier={"name": "longshore.tasks.exact_match:ExactMatch"})
    assert "is not installed" in fault


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"tasks": {"source": "jsonl"}}, "tasks.path: source jsonl needs the path"),
        ({"tasks": {"source": "jsonl", "path": "/no/such"}}, "tasks.path: there is no such file"),
        ({"tasks": {"source": "reasoning-gym"}}, "tasks.dataset: source reasoning-gym needs a data set"),
        ({"tasks": {"source": "reasoning-gym", "dataset": "countdown"}}, "tasks.dataset: its scorer evaluates"),
        ({"verifier": {"name": "exact-match", "options": {"extract": "("}}}, "verifier.options: extract is not a reg"),
        ({"verifier": {"name": "exact-match", "options": {"extract": "x"}}}, "verifier.options: extract must have exa"),
        ({"verifier": {"name": "exact-match", "options": {"case": 1}}}, "verifier.options: unknown option 'case'"),
        ({"verifier": {"name": "reasoning-gym", "options": {"x": 1}}}, "verifier.options: unknown option 'x'"),
        ({"environment": {"options": {"x": 1}}}, "environment.options: single-turn takes no options"),
    ],
)
def test_one_fault(parts: dict[str, object], says: str) -> None:
    (fault,) = faults(**parts)
    assert fault.startswith(says)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    tasks = lines(tmp_path / "open.jsonl", {"prompt": "1", "answer": "1"}, {"prompt": "Write a poem."})
    assert faults(tasks=tasks, verifier={"name": "exact-match"}, warm_start={}) == [
        "warm_start: needs answers to demonstrate, and task open-2 has none; remove warm_start",
        "verifier.name: cannot score these tasks: task open-2 has no answer to compare with",
    ]
    assert faults(tasks=tasks) == [
        "verifier.name: cannot score these tasks: task open-1 was not made by the task source reasoning-gym"
    ]


def test_too_few_heldout_tasks(tmp_path: Path) -> None:
    tasks = lines(tmp_path / "few.jsonl", *({"prompt": f"{n}=", "answer": str(n)} for n in range(50)))
    parts = {"tasks": tasks | {"heldout_fraction": 0.2}, "verifier": {"name": "exact-match"}}
    (fault,) = faults(**parts, evaluation={"tasks": 40})
    assert fault.startswith("evaluation.tasks: 40 held-out tasks are wanted")
    assert faults(**parts, evaluation={"tasks": 3}) == []


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    model = {"kind": "directory", "path": str(tmp_path)}
    assert [fault.split(":")[:2] for fault in faults(model=model)] == [
        ["model.path", " has no config.json"],
        ["model.path", " has no *.safetensors"],
        ["model.path", " has no tokenizer.json"],
    ]
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    assert faults(model=model) == [
        "model.path: is a BertModel, and only decoders with their head (...ForCausalLM) are trained"
    ]
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert faults(model=model) == []


def test_models_of_other_sources_are_told_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert faults(model={"kind": "gguf", "path": str(file)}) == [
        "model.path: cannot be read: No such file or directory"
    ]
    file.write_bytes(b"GGUF")
    assert faults(model={"kind": "gguf", "path": str(file)}) == []
    assert faults(model={"kind": "hub", "name": "someone/model"}) == []
    with pytest.raises(InvalidJobSpec, match=r"model\.name"):
        job(model={"kind": "hub", "name": "../../etc/passwd"})


BAD_PLUGINS = """
class Source:
    version = "1"
    size = None
    def __init__(self, spec, seed, environment):
        raise RuntimeError("boom in the source")
class Careless:
    @classmethod
    def check_options(cls, options):
        raise KeyError("colour")
class Half:
    def snapshot(self):
        return b""
NotAClass = 3
"""


def test_plugins_that_raise_become_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {
        registry.SOURCES: {"bad-source": "ls_bad_plugins:Source"},
        registry.ENVIRONMENTS: {
            "careless": "ls_bad_plugins:Careless",
            "half": "ls_bad_plugins:Half",
            "no-class": "ls_bad_plugins:NotAClass",
        },
        registry.VERIFIERS: {"exact-match": "ls_bad_plugins:Careless", "gone": "ls_no_such_module:Verifier"},
    }
    folder = write_package(tmp_path / "site", "ls_bad_plugins", {"ls_bad_plugins.py": BAD_PLUGINS}, groups)
    monkeypatch.syspath_prepend(str(folder))
    registry._find.cache_clear()
    try:
        found = faults(tasks={"source": "bad-source"}, environment={"name": "careless"}, verifier={"name": "gone"})
        assert found[0] == "environment.options: the plug-in failed: 'colour'"
        assert "failed to load: ModuleNotFoundError" in found[1]
        assert found[2:] == ["tasks: the plug-in failed: boom in the source"]
        assert faults(environment={"name": "half"}) == [
            "environment.name: the environment has snapshot without restore"
        ]
        with pytest.raises(PluginError, match="must be a class"):
            registry.load(registry.ENVIRONMENTS, "no-class")
        # A package cannot take the place of a built-in verifier.
        with pytest.raises(PluginError, match="'exact-match' is installed more than once"):
            registry.load(registry.VERIFIERS, "exact-match")
    finally:
        registry._find.cache_clear()
        sys.modules.pop("ls_bad_plugins", None)


def test_faults_of_the_document_and_of_the_world_come_in_one_list() -> None:
    document = {
        "name": "both",
        "tasks": {"source": "reasoning-gym", "dataset": "no_such_set", "colour": 1},
        "verifier": {"name": "judge"},
        "train": {"steps": 0, "group_size": "one"},
    }
    with pytest.raises(InvalidJobSpec) as caught:
        check_document(document)
    assert {fault.path for fault in caught.value.faults} == {
        "tasks.colour",
        "train.steps",
        "train.group_size",
        "verifier.name",
        "tasks.dataset",
    }


def test_a_document_of_which_too_little_is_left_gives_its_own_faults() -> None:
    with pytest.raises(InvalidJobSpec) as caught:
        check_document({"name": "x", "train": {"steps": 3}})
    assert {fault.path for fault in caught.value.faults} == {"tasks", "verifier"}
