"""Answers and chunks of streams as OpenAI's clients read them, with Longshore's own fields beside.

Longshore's own: `policy_version` (the newest that drew a token of the answer), each choice's `spans` (which tokens
which version drew, law 2), `token_ids`, `token_logprobs` and `prompt_token_ids` where they were asked for, `warnings`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from longshore.generator.openai_http.asked import Asked
from longshore.generator.openai_http.draft import Piece, Reply, Told
from longshore.generator.openai_http.tool_calls import FoundCall
from longshore.types import EngineFingerprint

Json = dict[str, Any]


@dataclass
class Answer:
    """What all parts of one answer share."""

    request_id: str
    is_chat: bool
    asked: Asked
    engine: EngineFingerprint
    # Text of one token, as it stands in the vocabulary.
    token_text: Callable[[int], str]
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, replies: list[Reply]) -> Json:
        """An answer that is not streamed."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        choices = [self._choice(index, reply) for index, reply in enumerate(replies)]
        version = max(piece.version for reply in replies for piece in reply.pieces)
        drawn = sum(reply.num_tokens for reply in replies)
        return {**self._head(kind, version), **self._extras(), "choices": choices, "usage": self.usage(drawn)}

    def chunk(self, index: int, piece: Piece, before: Told) -> Json | None:
        """One part of a stream; None where there is nothing to say yet.

        Args:
            before: what has been told of the same choice before this piece.
        """
        is_first = before.pieces == 0
        tells_tokens = self.asked.return_token_ids or self.asked.logprobs
        if not (is_first or piece.text or piece.calls or piece.finish or tells_tokens):
            return None
        choice: Json = {"index": index, "finish_reason": piece.finish, "logprobs": self._logprobs([piece])}
        if self.is_chat:
            choice["delta"] = _delta(piece, is_first, before.calls)
        else:
            choice["text"] = piece.text
        choice |= self._about_tokens(index, [piece], with_prompt=is_first, start=before.tokens)
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        extras = self._extras() if is_first else {}
        usage = {"usage": None} if self.asked.include_usage else {}
        return {**self._head(kind, piece.version), **extras, "choices": [choice], **usage}

    def last_chunk(self, version: int, drawn: int) -> Json:
        """The usage, as a stream's last part."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head(kind, version), "choices": [], "usage": self.usage(drawn)}

    def usage(self, drawn: int) -> Json:
        prompt = self.asked.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    def _head(self, kind: str, version: int) -> Json:
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": fingerprint(self.engine, version),
            "policy_version": version,
        }

    def _extras(self) -> Json:
        found: Json = {}
        if self.is_chat and self.asked.return_token_ids:
            found["prompt_token_ids"] = list(self.asked.prompts[0])
        if self.asked.warnings:
            found["warnings"] = list(self.asked.warnings)
        return found

    def _choice(self, index: int, reply: Reply) -> Json:
        choice: Json = {
            "index": index,
            "finish_reason": reply.pieces[-1].finish,
            "logprobs": self._logprobs(reply.pieces),
        }
        if self.is_chat:
            message: Json = {"role": "assistant", "content": reply.text, "refusal": None}
            if reply.calls:
                message["content"] = reply.text if reply.text.strip() else None
                message["tool_calls"] = [_tool_call(call) for call in reply.calls]
            choice["message"] = message
        else:
            choice["text"] = reply.text
        return choice | self._about_tokens(index, reply.pieces, with_prompt=True, start=0)

    def _about_tokens(self, index: int, pieces: list[Piece], *, with_prompt: bool, start: int) -> Json:
        found: Json = {"spans": spans(pieces, start)}
        if self.asked.return_token_ids:
            found["token_ids"] = [token for piece in pieces for token in piece.token_ids]
            found["token_logprobs"] = [value for piece in pieces for value in piece.logprobs]
            if with_prompt and not self.is_chat:
                found["prompt_token_ids"] = list(self.asked.prompts[index // self.asked.n])
        return found

    def _logprobs(self, pieces: list[Piece]) -> Json | None:
        if not self.asked.logprobs:
            return None
        texts = [self.token_text(token) for piece in pieces for token in piece.token_ids]
        values = [value for piece in pieces for value in piece.logprobs]
        if self.is_chat:
            return {"content": [_token_logprob(text, value) for text, value in zip(texts, values, strict=True)]}
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": None}


def model(name: str, owner: str, created: int, **more: object) -> Json:
    """One entry of the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": owner, **more}


def fingerprint(engine: EngineFingerprint, version: int) -> str:
    """What made the tokens, as one word."""
    return f"{engine.engine}-{engine.engine_version}-{engine.dtype}-{engine.config_digest}@{version}"


def spans(pieces: Iterable[Piece], start: int) -> list[Json]:
    """Which tokens of a reply which version drew; `start` counts from the reply's first token."""
    found: list[Json] = []
    for piece in pieces:
        mark = {"policy_version": piece.version, "kv": piece.kv.value, "kv_min_version": piece.kv_min_version}
        if found and found[-1].items() >= mark.items():
            found[-1]["length"] += len(piece.token_ids)
        elif piece.token_ids:
            found.append({"start": start, "length": len(piece.token_ids), **mark})
        start += len(piece.token_ids)
    return found


def _delta(piece: Piece, is_first: bool, calls_before: int) -> Json:
    delta: Json = {"role": "assistant"} if is_first else {}
    if piece.text or (is_first and not piece.calls):
        delta["content"] = piece.text
    if piece.calls:
        delta["tool_calls"] = [
            {"index": calls_before + number, **_tool_call(call)} for number, call in enumerate(piece.calls)
        ]
    return delta


def _tool_call(call: FoundCall) -> Json:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _token_logprob(text: str, value: float) -> Json:
    return {
        "token": text,
        "logprob": value,
        # A part of a character has no text, and its bytes are not known here.
        "bytes": None if "\ufffd" in text else list(text.encode()),
        "top_logprobs": [],
    }
