"""What the OpenAI-compatible interface counts."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

REQUESTS = Counter(
    "longshore_generator_openai_requests_total",
    "Requests by route and by what became of them: the status, or `gone` where the caller left first",
    ("route", "outcome"),
)
FIRST_TOKEN_SECONDS = Histogram(
    "longshore_generator_openai_first_token_seconds",
    "From a streamed request's head to the first token of its first reply",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
TOKENS = Counter("longshore_generator_openai_tokens_total", "Tokens by kind: prompt, completion", ("kind",))
