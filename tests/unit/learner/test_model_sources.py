"""Pretrained models from GGUF files and from the hub: the same model, or one clear line."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longshore.config_model import DirectoryModel, GgufModel, HubModel
from longshore.errors import ConfigError
from longshore.learner.model import load_checkpoint
from longshore.learner.model_sources import checkpoint_folder
from longshore.tasks.rendering import Renderer
from longshore.types import Message

VOCABULARY = 40
TOKENS = [f"<|{number}|>" for number in range(3)] + [chr(97 + number) for number in range(VOCABULARY - 4)] + ["ab"]


def tiny_model(seed: int) -> LlamaForCausalLM:
    """Heads as wide as GGUF's llama has them unless it says otherwise."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.2, **shape, **heads)).eval()


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as GGUF's llama has them: the two halves of each head interleaved."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (VOCABULARY - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}<|1|>")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if "q_proj" in name:
            value = turned(value, config.num_attention_heads)
        elif "k_proj" in name:
            value = turned(value, config.num_key_value_heads)
        known = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{known}.weight", value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(torch.tensor([[5, 9, 3, 30, 7]])).logits
    return made


def test_a_gguf_file_becomes_the_model_that_it_was_made_of_once(tmp_path: Path) -> None:
    model = tiny_model(3)
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model)
    source = GgufModel(kind="gguf", path=file)
    folder = checkpoint_folder(source, tmp_path / "models")
    policy, assets = load_checkpoint(folder, "model.path tiny.gguf")
    assert torch.equal(logits(policy), logits(model))
    assert policy.config.tie_word_embeddings
    assert Renderer(assets).prompt_ids([Message("user", "cab")]) == [5, VOCABULARY - 1, 1]
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert checkpoint_folder(source, tmp_path / "models") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in (tmp_path / "models").iterdir()] == [folder.name], "nothing half-made is left"

    write_gguf(file, tiny_model(4))
    other = checkpoint_folder(source, tmp_path / "models")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(other)), logits(tiny_model(4)))


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConfigError, match=r"^model\.path .*tiny\.gguf cannot be read: ") as caught:
        checkpoint_folder(GgufModel(kind="gguf", path=file), tmp_path / "models")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("models/*"))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_model(3))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(ConfigError, match=r"needs accelerate: install longshore\[gguf\]"):
        checkpoint_folder(GgufModel(kind="gguf", path=file), tmp_path / "models")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache in a folder of ours, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_model_of_the_hub_that_was_downloaded_before_needs_no_network(offline: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = offline / "models--someone--tiny" / "snapshots" / commit
    tiny_model(3).save_pretrained(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    folder = checkpoint_folder(HubModel(kind="hub", name="someone/tiny"), tmp_path)
    assert folder.name == commit
    with pytest.raises(ConfigError, match=r"^model\.name someone/tiny has no tokenizer\.json"):
        load_checkpoint(folder, "model.name someone/tiny")


def test_without_the_hub_one_line_says_what_to_do(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.name someone/other: the hub cannot be reached.*kind directory$"):
        checkpoint_folder(HubModel(kind="hub", name="someone/other"), tmp_path)


def test_a_directory_is_where_it_is(tmp_path: Path) -> None:
    assert checkpoint_folder(DirectoryModel(kind="directory", path=tmp_path), tmp_path / "models") == tmp_path


def test_a_checkpoint_whose_weights_are_torn_is_refused(tmp_path: Path) -> None:
    tiny_model(3).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"^model\.path here cannot be loaded: [^\n]+$"):
        load_checkpoint(tmp_path, "model.path here")
