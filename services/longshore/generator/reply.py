"""One request in the engine: what it still may draw, and the tokens that no event has told of yet.

Knows nothing of slots' contents, threads or torch.
"""

from __future__ import annotations

from longshore.generator.engine import EngineRequest, TokensDrawn
from longshore.types import FinishReason, KvMark

# An event is due when it holds this many tokens, or when its first one is this old. Every event costs a message and
# a wake-up on both sides, and nobody trains on part of a reply: short replies should be one event. Who watches a reply
# pays for more.
FLUSH_TOKENS = 32
FLUSH_S = 0.5


class Reply:
    """A request that holds a slot, from its admission under `version` on."""

    def __init__(self, request: EngineRequest, slot: int, version: int, context: int) -> None:
        self.request = request
        self.slot = slot
        # The version that draws its tokens.
        self.version = version
        # None until the first swap: then the oldest version that the cache holds keys and values of.
        self._carried_since: int | None = None
        # Tokens that it may have yet.
        self.left = min(request.sampling.max_new_tokens, context - len(request.token_ids))
        self._stop = frozenset(request.sampling.stop_token_ids)
        # Prompt and reply.
        self.tokens = list(request.token_ids)
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._flush_tokens = 1 if request.watched else FLUSH_TOKENS
        self._flush_at = 0.0

    def add(self, token: int, logprob: float, now: float) -> TokensDrawn | None:
        """Takes one drawn token; the event that is due, if one is."""
        if not self._token_ids:
            self._flush_at = now + FLUSH_S
        self.tokens.append(token)
        self._token_ids.append(token)
        self._logprobs.append(logprob)
        self.left -= 1
        if token in self._stop:
            return self._event(FinishReason.STOP)
        if self.left == 0:
            return self._event(FinishReason.LENGTH)
        if len(self._token_ids) >= self._flush_tokens or now >= self._flush_at:
            return self._event(None)
        return None

    def swapped(self, version: int, recomputed: bool = False) -> TokensDrawn | None:
        """Goes on under another version; the event of the old version's tokens, if any.

        Args:
            recomputed: whether the new version computes the cache anew; else it goes on with it as it is.
        """
        event = self._event(None) if self._token_ids else None
        oldest = self.version if self._carried_since is None else self._carried_since
        self._carried_since = None if recomputed else min(oldest, version)
        self.version = version
        return event

    def restarted(self) -> TokensDrawn | None:
        """Goes on with a cache that the present version computes anew; the event of the tokens before that, if any."""
        event = self._event(None) if self._token_ids else None
        self._carried_since = None
        return event

    def _event(self, finish: FinishReason | None) -> TokensDrawn:
        event = TokensDrawn(
            request_id=self.request.request_id,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            version=self.version,
            kv=KvMark.RECOMPUTED if self._carried_since is None else KvMark.CARRIED,
            kv_min_version=self._carried_since,
            finish=finish,
        )
        self._token_ids, self._logprobs = [], []
        return event
