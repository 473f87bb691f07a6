"""The task source `jsonl`: one problem a line of a file.

    {"prompt": "3+4=", "answer": "7"}
    {"prompt": [{"role": "user", "content": "3+4="}], "answer": "7", "info": {"level": 1}, "id": "sum-34"}

The file is read once, line by line, and only the lines' places are kept: it may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path

from longshore.config import TasksSpec
from longshore.errors import ConfigError, Fault, InvalidJobSpec
from longshore.tasks.source import MAX_INFO_CHARACTERS
from longshore.types import Message, Task

MAX_LINE_BYTES = 1024 * 1024
MAX_FAULTS = 20
_KEYS = ("prompt", "answer", "info", "id")
_ROLES = ("system", "user", "assistant", "tool")


class JsonlSource:
    """Tasks of the file at `tasks.path`, in its order."""

    size: int

    def __init__(self, spec: TasksSpec, seed: int, environment: str) -> None:
        del seed
        faults = _check_spec(spec)
        if faults or spec.path is None:
            raise InvalidJobSpec(faults)
        self._path = spec.path
        self._environment = environment
        # Where each task's line starts, and its number for messages.
        self._offsets, self._lines = array("Q"), array("Q")
        try:
            self.version = self._read()
        except OSError as error:
            raise InvalidJobSpec([Fault("tasks.path", str(spec.path), f"cannot be read: {error.strerror}")]) from None
        self.size = len(self._offsets)
        if not self.size:
            raise InvalidJobSpec([Fault("tasks.path", str(spec.path), "holds no tasks")])

    def task(self, ordinal: int) -> Task | None:
        """Raises ConfigError when the file has changed since it was checked."""
        if ordinal >= self.size:
            return None
        number = self._lines[ordinal]
        try:
            with self._path.open("rb") as file:
                file.seek(self._offsets[ordinal])
                return parse_line(file.readline(MAX_LINE_BYTES + 1), self._default_id(number), self._environment)
        except (OSError, ValueError) as error:
            raise ConfigError(f"tasks.path {self._path} line {number} changed while in use: {error}") from None

    def _read(self) -> str:
        faults: list[Fault] = []
        digest, offset, number = hashlib.sha256(), 0, 0
        with self._path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                digest.update(line)
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                    faults.extend(self._check_line(line, number))
                if len(faults) >= MAX_FAULTS or len(line) > MAX_LINE_BYTES:
                    break
                offset += len(line)
        if faults:
            raise InvalidJobSpec(faults)
        return f"sha256:{digest.hexdigest()[:16]}"

    def _check_line(self, line: bytes, number: int) -> list[Fault]:
        try:
            parse_line(line, self._default_id(number), self._environment)
        except ValueError as error:
            return [Fault("tasks.path", str(self._path), f"line {number}: {error}")]
        return []

    def _default_id(self, number: int) -> str:
        return f"{self._path.stem}-{number}"


def _check_spec(spec: TasksSpec) -> list[Fault]:
    faults = []
    if spec.path is None:
        faults.append(Fault("tasks.path", None, "source jsonl needs the path of a file with one JSON object a line"))
    elif not Path(spec.path).is_file():
        faults.append(Fault("tasks.path", str(spec.path), "there is no such file"))
    if spec.dataset is not None:
        faults.append(Fault("tasks.dataset", spec.dataset, "is for source reasoning-gym, not for jsonl"))
    if spec.options:
        faults.append(Fault("tasks.options", spec.options, "source jsonl takes no options"))
    return faults


def parse_line(line: bytes, default_id: str, environment: str) -> Task:
    """Reads one line. Raises ValueError with what is wrong with it."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"is longer than {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("must be a JSON object with a prompt")
    if not _encodable(line.decode("utf-8"), record):
        raise ValueError("holds half a surrogate pair, which is not text")
    unknown = [key for key in record if key not in _KEYS]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}; anything else goes into info")
    answer, info, task_id = record.get("answer"), record.get("info", {}), record.get("id", default_id)
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"answer must be a string, not {json.dumps(answer)[:40]}")
    if not isinstance(info, dict) or len(json.dumps(info)) > MAX_INFO_CHARACTERS:
        raise ValueError(f"info must be a JSON object of at most {MAX_INFO_CHARACTERS} characters")
    if not isinstance(task_id, str) or not task_id:
        raise ValueError("id must be a non-empty string")
    return Task(task_id, _messages(record.get("prompt")), answer, info, environment)


def _encodable(line: str, record: dict[str, object]) -> bool:
    # Only an escape can bring in a lone surrogate, so that most lines need no second pass.
    if "\\u" not in line:
        return True
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _messages(prompt: object) -> tuple[Message, ...]:
    if isinstance(prompt, str) and prompt:
        return (Message("user", prompt),)
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("prompt must be a non-empty string or a list of messages")
    messages = []
    for entry in prompt:
        if not isinstance(entry, dict) or entry.keys() != {"role", "content"}:
            raise ValueError("each message of prompt must have exactly role and content")
        role, content = entry["role"], entry["content"]
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(f"a message's role must be one of {', '.join(_ROLES)}, and its content a string")
        messages.append(Message(role, content))
    return tuple(messages)
