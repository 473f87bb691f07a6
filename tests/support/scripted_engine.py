"""An engine that says what a test wrote down, behind the real calls, routes and HTTP server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

from tiny_tokenizer import assets

from longshore.generator.calls import Calls
from longshore.generator.engine import (
    EngineEvent,
    EngineLimits,
    EngineRequest,
    EngineStatus,
    TokensDrawn,
    check_request,
)
from longshore.generator.openai_http.app import OpenAiApp
from longshore.generator.openai_http.models import Models
from longshore.generator.openai_http.vocabulary import Vocabulary
from longshore.rpc.http_server import serve_http
from longshore.rpc.key_file import KeyFile, digest_line
from longshore.types import EngineFingerprint, FinishReason, JobRef, KvMark

KEY = "scripted-key"
JOB = JobRef("default", "scripted-000000")


class ScriptedEngine:
    """Answers each request with the tokens of a text, one event a token, all at once."""

    fingerprint = EngineFingerprint("scripted", "1", "float32", "none")
    limits = EngineLimits(vocab_size=100, context=4096, slots=4, max_waiting=4)

    def __init__(self, calls: Calls, vocabulary: Vocabulary, script: Callable[[str], str]) -> None:
        """
        Args:
            script: the reply to a prompt, both as text with special tokens.
        """
        self.ended: Future[None] = Future()
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        # Says nothing, as an engine does whose slots are taken.
        self.is_silent = False
        self._calls = calls
        self._vocabulary = vocabulary
        self._script = script

    def submit(self, request: EngineRequest) -> None:
        check_request(request, self.limits)
        self.requests.append(request)
        if self.is_silent:
            return
        said = self._script(self._vocabulary.text(list(request.token_ids)))
        self._calls.deliver(list(self._events(request, said)))

    def _events(self, request: EngineRequest, said: str) -> Iterable[EngineEvent]:
        tokens = self._vocabulary.renderer.reply_ids(said)[: request.sampling.max_new_tokens]
        for number, token in enumerate(tokens, 1):
            finish = FinishReason.STOP if token in request.sampling.stop_token_ids else None
            if finish is None and number == len(tokens):
                finish = FinishReason.LENGTH
            yield TokensDrawn(request.request_id, (token,), (-0.5,), 7, KvMark.RECOMPUTED, finish=finish)
            if finish is not None:
                return

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def status(self) -> EngineStatus:
        return EngineStatus(7, 0, 0, 0.0)


class ScriptedServer:
    """The interface over a scripted engine, in the test's own process."""

    def __init__(self, folder: Path, template: str, script: Callable[[str], str], replies_per_key: int = 64) -> None:
        self._stop = asyncio.Event()
        calls = Calls(JOB)
        vocabulary = Vocabulary(assets(template))
        self.engine = ScriptedEngine(calls, vocabulary, script)
        calls.engine = self.engine  # type: ignore[assignment] # it is never staged or swapped
        path = folder / "keys"
        path.write_text(digest_line("tester", KEY))
        models, keys = Models(JOB, "scripted"), KeyFile(path, "keys")
        self.app = OpenAiApp(calls, models, keys, self._stop, max_request_s=30.0, replies_per_key=replies_per_key)
        self.app.vocabulary = vocabulary
        self.url = ""

    async def __aenter__(self) -> ScriptedServer:
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def on_listening(address: str) -> None:
            listening.set_result(address)

        self._serving = asyncio.create_task(serve_http(self.app, "127.0.0.1:0", 1.0, self._stop, on_listening))
        self.url = f"http://{await listening}/v1"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stop.set()
        await self._serving
