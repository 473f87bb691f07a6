"""Where a pretrained model comes from: a directory, the Hugging Face hub, a GGUF file; each ends as a directory."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path

import structlog
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longshore.config_model import DirectoryModel, GgufModel, HubModel
from longshore.errors import ConfigError
from longshore.model_files import CONFIG, INDEX, SAFETENSORS, gguf_fault

log = structlog.get_logger()

ASSET_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
)
# Of what a GGUF file becomes: another way of converting it is another folder.
_CONVERSION = 1
_GGUF_NEEDS = ("gguf", "accelerate")
# Of the configuration that is read: what the copy is not.
_NOT_KEPT = ("quantization_config", "_name_or_path", "dtype")


def checkpoint_folder(model: DirectoryModel | HubModel | GgufModel, models_dir: Path) -> Path:
    """The directory that holds the job's model, brought or made if need be; may take minutes.

    Raises:
        ConfigError: it cannot be had; one line, names the field.
    """
    if isinstance(model, HubModel):
        return _downloaded(model)
    return _converted(model, models_dir) if isinstance(model, GgufModel) else model.path


def _downloaded(model: HubModel) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"model.name {model.name}"
    wanted = [*ASSET_FILES, SAFETENSORS, INDEX]
    try:
        folder = Path(snapshot_download(model.name, revision=model.revision, allow_patterns=wanted))
    except GatedRepoError:
        raise ConfigError(f"{named} is gated: accept its terms at the hub, and set HF_TOKEN for the learner") from None
    except RevisionNotFoundError:
        raise ConfigError(f"model.revision {model.revision}: the hub has no such revision of {model.name}") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"{named}: the hub has no such model, or only with an HF_TOKEN that may see it") from None
    except LocalEntryNotFoundError:
        message = "the hub cannot be reached, and it was not downloaded before: use model.kind directory"
        raise ConfigError(f"{named}: {message}") from None
    except (HFValidationError, OSError) as error:
        raise ConfigError(f"{named} cannot be downloaded: {' '.join(str(error).split())}") from None
    log.info("model from the hub", name=model.name, revision=model.revision, folder=str(folder))
    return folder


def _converted(model: GgufModel, models_dir: Path) -> Path:
    """The file's content decides the folder, so that a file that was replaced is converted anew."""
    if fault := gguf_fault(model.path):
        raise ConfigError(f"model.path {model.path} {fault}")
    with model.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = models_dir / f"gguf-{digest[:32]}-{_CONVERSION}"
    if not (folder / CONFIG).is_file():
        convert_gguf(model.path, folder, torch.float32)
    return folder


def convert_gguf(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """De-quantises a GGUF file into a checkpoint directory, which appears whole or not at all.

    Raises:
        ConfigError: packages are missing, or it holds no model that transformers knows.
    """
    missing = [name for name in _GGUF_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"model.path {file}: reading GGUF needs {' and '.join(missing)}: install longshore[gguf]")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        read = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
    except Exception as error:  # noqa: BLE001 - a stranger's file: the parsers raise anything, tokenizers bare Exception
        raise ConfigError(f"model.path {file} cannot be read: {' '.join(str(error).split())}") from None
    # What was read still says that it is quantised, and cannot be saved.
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k not in _NOT_KEPT})
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(read.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # Others than this user may run the learner.
        part.chmod(0o755)
        plain.save_pretrained(part, safe_serialization=True)
        tokenizer.save_pretrained(part)
        # Another learner may have been first: what it made is as good.
        if not folder.is_dir():
            part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    log.info("model from GGUF", file=str(file), folder=str(folder))
