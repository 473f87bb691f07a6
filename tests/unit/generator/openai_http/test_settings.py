"""What a generator is told of the interface, and what the job's assets leave it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import assets

from longshore.errors import ConfigError
from longshore.generator.calls import Calls
from longshore.generator.config import GeneratorSettings
from longshore.generator.openai_http.serving import OpenAiServer
from longshore.generator.openai_http.vocabulary import Vocabulary
from longshore.rpc.key_file import digest_line
from longshore.settings import JobFile

JOB = JobFile.model_validate(
    {
        "project": "default",
        "job": "j-1",
        "spec": {
            "name": "j",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
        },
        "learner_public_key": "ab" * 32,
    }
)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "openai.keys"
    path.write_text(digest_line("alice", "one"))
    return path


def made(**settings: Any) -> OpenAiServer:
    told = GeneratorSettings(job_file=Path("x"), weights="127.0.0.1:1", **settings)
    return OpenAiServer(told, JOB, Calls(JOB.ref), asyncio.Event())


async def test_plain_text_is_for_loopback_alone(keys: Path) -> None:
    made(openai_listen="127.0.0.1:0", openai_keys_file=keys)
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0:8000 is not on loopback.*OPENAI_TLS_CERT"):
        made(openai_listen="0.0.0.0:8000", openai_keys_file=keys)
    made(openai_listen="0.0.0.0:8000", openai_keys_file=keys, openai_tls_cert=Path("c"), openai_tls_key=Path("k"))
    with pytest.raises(ConfigError, match="set both"):
        made(openai_listen="127.0.0.1:0", openai_keys_file=keys, openai_tls_cert=Path("c"))


async def test_keys_are_always_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LONGSHORE_OPENAI_KEYS_FILE"):
        made(openai_listen="127.0.0.1:0")
    with pytest.raises(ConfigError, match=r"LONGSHORE_OPENAI_KEYS_FILE .*No such file"):
        made(openai_listen="127.0.0.1:0", openai_keys_file=tmp_path / "none")


def test_tokens_that_mark_calls_are_shown_even_when_they_are_special() -> None:
    files = assets()
    core = Vocabulary(files).renderer._tokenizer
    core.add_special_tokens(["<tool_call>", "</tool_call>", "<|other|>"])
    vocabulary = Vocabulary({**files, "tokenizer.json": core.to_str().encode()})
    shown = {core.token_to_id(token): token for token in ("<tool_call>", "</tool_call>", "<|other|>", "<|im_end|>")}
    assert [token for number, token in shown.items() if number not in vocabulary.hidden] == [
        "<tool_call>",
        "</tool_call>",
    ]
