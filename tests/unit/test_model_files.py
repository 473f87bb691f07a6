"""What a checkpoint directory must hold, told without loading it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longshore.model_files import checkpoint_faults, config_faults, gguf_fault

LLAMA: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def checkpoint(folder: Path, *names: str, config: object = LLAMA) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in names:
        (folder / name).touch()
    return folder


def test_a_checkpoint_is_fine(tmp_path: Path) -> None:
    assert checkpoint_faults(checkpoint(tmp_path / "m", "tokenizer.json", "model.safetensors")) == []


def test_decoders_of_an_older_name_are_fine() -> None:
    assert config_faults(json.dumps({"architectures": ["GPT2LMHeadModel"]}).encode()) == []


def test_everything_that_is_missing_is_named(tmp_path: Path) -> None:
    assert checkpoint_faults(tmp_path / "nowhere") == ["there is no such directory"]
    found = checkpoint_faults(tmp_path)
    assert [text.split(":")[0] for text in found] == [
        "has no config.json",
        "has no *.safetensors",
        "has no tokenizer.json",
    ]


def test_pickled_weights_are_refused_and_told_apart_from_none(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "tokenizer.json", "pytorch_model.bin")
    (fault,) = checkpoint_faults(folder)
    assert "pytorch_model.bin" in fault
    assert "pickle" in fault
    # Beside safetensors they are not read, and do no harm.
    (folder / "model.safetensors").touch()
    assert checkpoint_faults(folder) == []


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"architectures": ["BertModel"]}, "is a BertModel, and only decoders"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "an encoder with a decoder"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised (gptq)"),
        ({**LLAMA, "quantization_config": 4}, "is quantised (an unknown way)"),
        ({**LLAMA, "auto_map": {"AutoModel": "model.Mine"}}, "code of its own"),
        ([], "not a JSON object"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_its_config(config: object, part: str) -> None:
    (fault,) = config_faults(json.dumps(config).encode())
    assert part in fault


def test_a_config_that_is_not_json() -> None:
    assert config_faults(b"{") == ["has a config.json that is not a JSON object"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.safetensors"], []),
        (
            ["a.safetensors", "b.safetensors"],
            ["lacks 1 of the files in model.safetensors.index.json, b.safetensors first"],
        ),
        (["../a.safetensors"], ["lacks 1 of the files in model.safetensors.index.json, ../a.safetensors first"]),
    ],
)
def test_every_shard_has_to_be_there_in_the_folder(tmp_path: Path, files: list[str], expected: list[str]) -> None:
    folder = checkpoint(tmp_path / "m", "tokenizer.json", "a.safetensors")
    (tmp_path / "a.safetensors").touch()
    weight_map = {f"weight{number}": name for number, name in enumerate(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert checkpoint_faults(folder) == expected


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    assert gguf_fault(file) == "cannot be read: No such file or directory"
    file.write_bytes(b"PK\x03\x04")
    assert gguf_fault(file) == "is not a GGUF file"
    file.write_bytes(b"GGUF\x03")
    assert gguf_fault(file) is None
