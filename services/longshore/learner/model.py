"""The policy: a new small Llama with its own tokenizer, or a pretrained model of a Hugging Face checkpoint.

Also what travels beside the weights: `assets`, the config and tokenizer files that a generator or an actor needs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from longshore.config import JobSpec
from longshore.config_model import DirectoryModel, GgufModel, HubModel, NewModel
from longshore.errors import ConfigError
from longshore.learner.lora import merged, parts
from longshore.learner.model_sources import ASSET_FILES, checkpoint_folder
from longshore.learner.ranks.ranks import ALONE, Ranks
from longshore.model_files import checkpoint_faults
from longshore.types import Task

# A process's log is no place for progress bars.
transformers_logging.disable_progress_bar()

PAD, EOS, ANSWER, UNKNOWN = "<|pad|>", "<|eos|>", "<|answer|>", "<|unknown|>"
# A fixed instruction that every prompt shares becomes one token, when it is at least this long.
MIN_SHARED_CHARACTERS = 4
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|answer|>{{ message['content'] }}<|eos|>{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def build_policy(spec: JobSpec, tasks: Iterable[Task], models_dir: Path) -> tuple[PreTrainedModel, dict[str, bytes]]:
    """The policy in float32 and its assets (file name -> content).

    Args:
        spec: the job; its seed decides a new model's weights.
        tasks: training tasks to build a new model's tokenizer from.
        models_dir: where models are kept that had to be converted.

    Raises:
        ConfigError: the model cannot be had, or is none that can be trained; one line, names the field.
    """
    if isinstance(spec.model, NewModel):
        tokenizer = character_tokenizer(tasks)
        return _new_model(spec.model, tokenizer, spec.seed), _saved(tokenizer, spec.model)
    return load_checkpoint(checkpoint_folder(spec.model, models_dir), _named(spec.model))


def character_tokenizer(tasks: Iterable[Task]) -> PreTrainedTokenizerFast:
    """One token a character, plus one for the text that all prompts begin with.

    Every printable ASCII character is known, so that no prompt is unreadable; others are taken from the tasks.
    """
    prompts, characters = [], {chr(code) for code in range(32, 127)} | {"\n"}
    for task in tasks:
        text = "".join(message.content for message in task.problem)
        prompts.append(text)
        characters.update(text, task.answer or "")
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, ANSWER, UNKNOWN, *sorted(characters)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([PAD, EOS, ANSWER, UNKNOWN])
    shared = os.path.commonprefix(prompts)  # noqa: RUF071 - texts, not paths
    if len(shared) >= MIN_SHARED_CHARACTERS:
        core.add_tokens([AddedToken(shared, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _new_model(model: NewModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(_llama_config(model, tokenizer)).float()


def _llama_config(model: NewModel, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.max_context,
        tie_word_embeddings=model.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _saved(tokenizer: PreTrainedTokenizerFast, model: NewModel) -> dict[str, bytes]:
    config = _llama_config(model, tokenizer)
    config.architectures = ["LlamaForCausalLM"]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        return read_assets(Path(folder))


def read_assets(folder: Path) -> dict[str, bytes]:
    """The config and tokenizer files of a checkpoint directory."""
    return {name: (folder / name).read_bytes() for name in ASSET_FILES if (folder / name).is_file()}


def load_checkpoint(folder: Path, named: str) -> tuple[PreTrainedModel, dict[str, bytes]]:
    """The policy of a checkpoint directory, in float32, and its assets.

    Raises:
        ConfigError: it cannot be trained; `named` is what the job calls it.
    """
    if faults := checkpoint_faults(folder):
        raise ConfigError(f"{named} {'; it '.join(faults)}")
    try:
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{named} cannot be loaded: {' '.join(str(error).split())}") from None
    return policy, read_assets(folder)


def _named(model: DirectoryModel | HubModel | GgufModel) -> str:
    return f"model.name {model.name}" if isinstance(model, HubModel) else f"model.path {model.path}"


def save_checkpoint(policy: torch.nn.Module, assets: dict[str, bytes], folder: Path, ranks: Ranks = ALONE) -> None:
    """Writes a Hugging Face checkpoint: what `AutoModelForCausalLM.from_pretrained` loads. Adapters are merged in.

    On every rank of those that share the policy out; the leader writes.
    """
    weights = {part.name: merged(part).cpu() for part in parts(policy) if ranks.is_leader}
    if not ranks.is_leader:
        return
    folder.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    for name, content in assets.items():
        # The weights were saved with their own config; the tokenizer files are added.
        if name not in ("config.json", "generation_config.json"):
            (folder / name).write_bytes(content)
