"""Who may call a gRPC server over mutual TLS: home's own processes everything, a rollout site what its site may read.

A site is known by its certificate, which is looked for in the book of good ones with each call, and again while a
call lasts: one that was revoked or has expired is out within a second, its streams too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog

from longshore.errors import ConfigError
from longshore.rpc.channel import tls_file
from longshore.sites.book import RECHECK_S, GoodCertificate, SiteBook
from longshore.sites.certificates import Certified, read_certificate

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]
_read = functools.lru_cache(maxsize=256)(read_certificate)


class SiteGuard(grpc.aio.ServerInterceptor):
    """Stands before every method of a server that speaks TLS."""

    def __init__(self, book: SiteBook | None, site_methods: frozenset[str] = frozenset()) -> None:
        """
        Args:
            book: without one, no site is let in, and whoever else the authority vouches for may do everything.
            site_methods: full names of what sites may call; each takes one request, whose `job` says which job it is
                about.
        """
        self._book = book
        self._site_methods = site_methods

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Puts the check before a method; None where there is no such method."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = f"{_word(handler.request_streaming)}_{_word(handler.response_streaming)}"
        inner = getattr(handler, kind)
        method = handler_call_details.method
        guarded = self._streaming(method, inner) if handler.response_streaming else self._unary(method, inner)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        made: grpc.RpcMethodHandler[Any, Any] = make(guarded, handler.request_deserializer, handler.response_serializer)
        return made

    def _unary(self, method: str, inner: Any) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with self._admitted(method, request, context):
                return await inner(request, context)

        return call

    def _streaming(self, method: str, inner: Any) -> Any:
        async def call(request: Any, context: Context) -> None:
            async with self._admitted(method, request, context):
                responses = inner(request, context)
                if inspect.isawaitable(responses):
                    await responses
                    return
                async with contextlib.aclosing(responses):
                    async for response in responses:
                        await context.write(response)

        return call

    @contextlib.asynccontextmanager
    async def _admitted(self, method: str, request: Any, context: Context) -> AsyncIterator[None]:
        """Lets a call run for as long as its caller may make it; else it ends with PERMISSION_DENIED."""
        refusal, good = self._judge(method, request, context)
        if refusal:
            log.warning("call refused", method=method, reason=refusal, peer=context.peer())
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)
        if good is None:
            yield
            return
        limit = asyncio.timeout(None)
        checking = asyncio.create_task(self._end_when_revoked(good, limit))
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, _ended(good.site))
        finally:
            checking.cancel()

    async def _end_when_revoked(self, good: GoodCertificate, limit: asyncio.Timeout) -> None:
        while self._book is not None and self._book.find(good.serial, good.site) is not None:  # noqa: ASYNC110 - a file
            await asyncio.sleep(RECHECK_S)
        limit.reschedule(asyncio.get_running_loop().time())

    def _judge(self, method: str, request: Any, context: Context) -> tuple[str, GoodCertificate | None]:
        """Why a call is refused, or ""; and the site's certificate if a site makes it."""
        shown = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
        if shown is None:
            return "show a certificate", None
        try:
            peer = _read(shown)
        except ConfigError as error:
            return str(error), None
        if peer.site is None:
            return self._judge_home(peer), None
        good = self._book.find(peer.serial, peer.site) if self._book is not None else None
        if good is None:
            return _ended(peer.site), None
        if method not in self._site_methods:
            return f"a rollout site may not call {method}", None
        project = request.job.project
        if good.project is not None and project != good.project:
            return f"site {good.site} takes part in jobs of project {good.project}, not of {project!r}", None
        return "", good

    def _judge_home(self, peer: Certified) -> str:
        if self._book is None or peer.is_home:
            return ""
        # Processes of one home that share one certificate need no mark in it.
        own = tls_file("LONGSHORE_TLS_CERT")
        if own is not None and _read(own).pem == peer.pem:
            return ""
        return "this certificate is neither a rollout site's nor home's own, which bears the URI longshore:home"


def _word(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _ended(site: str) -> str:
    return f"this certificate of site {site} is not good here: it was revoked, has expired, or is another home's"
