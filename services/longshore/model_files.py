"""What a Hugging Face checkpoint directory must hold to be trained, told without loading it.

Imports neither torch nor transformers: the gateway asks before a job starts, and the learner before it loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
SAFETENSORS, INDEX = "*.safetensors", "model.safetensors.index.json"
# Formats that run code when they are loaded (law 10).
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# How transformers calls decoders with their head; the second is GPT-2 and its kin.
_DECODER = ("ForCausalLM", "LMHeadModel")
_GGUF = b"GGUF"
_SAVE_AGAIN = "save it as safetensors where you trust it (save_pretrained)"


def checkpoint_faults(folder: Path) -> list[str]:
    """Why a directory's model cannot be trained, one sentence each; empty: nothing found.

    Example: ["has no tokenizer.json: load its tokenizer with transformers and save it there (save_pretrained)"]
    """
    if not folder.is_dir():
        return ["there is no such directory"]
    faults = _weights_faults(folder)
    if not (folder / TOKENIZER).is_file():
        faults.append(f"has no {TOKENIZER}: load its tokenizer with transformers and save it there (save_pretrained)")
    if not (folder / CONFIG).is_file():
        return [f"has no {CONFIG}: it must be a Hugging Face checkpoint directory", *faults]
    return config_faults((folder / CONFIG).read_bytes()) + faults


def gguf_fault(file: Path) -> str | None:
    """Why a file cannot be a GGUF model; None: nothing found."""
    try:
        with file.open("rb") as opened:
            begins = opened.read(len(_GGUF))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if begins == _GGUF else "is not a GGUF file"


def config_faults(content: bytes) -> list[str]:
    """Why a model cannot be trained, from its config.json."""
    try:
        config = json.loads(content)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        return [f"has a {CONFIG} that is not a JSON object"]
    if config.get("is_encoder_decoder"):
        return ["is an encoder with a decoder: only decoders (...ForCausalLM) are trained"]
    faults = []
    names = [str(name) for name in config.get("architectures") or []]
    if names and not any(name.endswith(_DECODER) for name in names):
        faults.append(f"is a {' or '.join(names)}, and only decoders with their head (...ForCausalLM) are trained")
    if config.get("auto_map"):
        faults.append("needs code of its own (auto_map), which is not run: take a model that transformers has")
    if quantised := _quantisation(config):
        faults.append(f"is quantised ({quantised}): take the checkpoint it was made of, or save it de-quantised")
    return faults


def _weights_faults(folder: Path) -> list[str]:
    if not any(folder.glob(SAFETENSORS)):
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            return [f"has its weights in {pickled[0]} alone, a pickle, which runs code when loaded: {_SAVE_AGAIN}"]
        return ["has no *.safetensors: its weights are missing"]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        named = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"has a {INDEX} that is no index of safetensors"]
    # Only names in the folder itself: an index is no way to other files.
    missing = sorted(name for name in named if Path(name).name != name or not (folder / name).is_file())
    return [f"lacks {len(missing)} of the files in {INDEX}, {missing[0]} first"] if missing else []


def _quantisation(config: dict[str, Any]) -> str | None:
    """How its weights are quantised; None: they are not."""
    found = config.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", "an unknown way")) if isinstance(found, dict) else "an unknown way"
