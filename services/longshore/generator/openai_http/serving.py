"""Puts the OpenAI-compatible interface together from a generator's settings, and serves it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from longshore.errors import ConfigError
from longshore.generator.calls import Calls
from longshore.generator.config import GeneratorSettings
from longshore.generator.openai_http.app import OpenAiApp
from longshore.generator.openai_http.models import Models
from longshore.generator.openai_http.vocabulary import Vocabulary
from longshore.rpc.channel import is_local
from longshore.rpc.http_server import serve_http
from longshore.rpc.key_file import KeyFile
from longshore.settings import JobFile

log = structlog.get_logger()


class OpenAiServer:
    """Serves one generator's calls over HTTP, from its start on; 503 until a version is proven."""

    def __init__(self, settings: GeneratorSettings, job: JobFile, calls: Calls, stop: asyncio.Event) -> None:
        """Raises ConfigError for settings that cannot work."""
        if settings.openai_keys_file is None:
            raise ConfigError(
                "LONGSHORE_OPENAI_LISTEN needs LONGSHORE_OPENAI_KEYS_FILE: nobody is let in without a key"
            )
        self._certificate = _certificate(settings)
        self._settings = settings
        self._stop = stop
        self._app = OpenAiApp(
            calls,
            Models(job.ref, job.spec.name),
            KeyFile(settings.openai_keys_file, "LONGSHORE_OPENAI_KEYS_FILE"),
            stop,
            max_request_s=settings.max_request_s,
            replies_per_key=settings.openai_replies_per_key,
        )

    async def read(self, assets: dict[str, bytes]) -> None:
        """Takes the tokenizer that came with the weights; without a good one, requests are refused with its fault."""
        try:
            self._app.vocabulary = await asyncio.to_thread(Vocabulary, assets)
        except ConfigError as error:
            log.warning("no text over HTTP", reason=str(error))
            self._app.no_vocabulary = str(error)

    async def run(self) -> None:
        """Serves until told to stop, then lets requests end. Raises ConfigError when the address cannot be had."""
        settings = self._settings
        try:
            await serve_http(
                self._app,
                settings.openai_listen,
                settings.drain_s,
                self._stop,
                self._announce,
                variable="LONGSHORE_OPENAI_LISTEN",
                certificate=self._certificate,
            )
        finally:
            if settings.openai_url_file is not None:
                settings.openai_url_file.unlink(missing_ok=True)

    async def _announce(self, address: str) -> None:
        """Writes down where it listens, for who did not choose the port."""
        path = self._settings.openai_url_file
        if path is None:
            return
        scheme = "http" if self._certificate is None else "https"
        part = path.with_suffix(".part")
        await asyncio.to_thread(part.write_text, f"{scheme}://{address}/v1\n", "utf-8")
        part.replace(path)


def _certificate(settings: GeneratorSettings) -> tuple[Path, Path] | None:
    certificate, key = settings.openai_tls_cert, settings.openai_tls_key
    if certificate is not None and key is not None:
        return certificate, key
    if certificate is not None or key is not None:
        raise ConfigError("set both LONGSHORE_OPENAI_TLS_CERT and LONGSHORE_OPENAI_TLS_KEY, or neither")
    if not is_local(settings.openai_listen):
        raise ConfigError(
            f"LONGSHORE_OPENAI_LISTEN {settings.openai_listen} is not on loopback: set LONGSHORE_OPENAI_TLS_CERT and "
            "LONGSHORE_OPENAI_TLS_KEY, or keys would be sent in plain text"
        )
    return None
