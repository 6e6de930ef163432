"""What the gateway counts for Prometheus, in a registry of its own: one replica's numbers."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_METHODS = frozenset(("GET", "HEAD", "POST", "OPTIONS"))
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class GatewayMetrics:
    """Labels hold route templates, never what a client wrote: their number is fixed."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "mmrl_gateway_requests",
            "Requests by route and status",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "mmrl_gateway_request_seconds",
            "From the request's head to the answer's end",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.under_way = Gauge("mmrl_gateway_requests_under_way", "Requests without an answer", registry=self._registry)
        self._first = Histogram(
            "mmrl_gateway_first_token_seconds",
            "From the request's head to the first text of a streamed answer",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter("mmrl_gateway_tokens", "Tokens by kind", ["kind"], registry=self._registry)
        self._scored = Counter("mmrl_gateway_scored_captions", "Captions scored", registry=self._registry)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request is over."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """A streamed answer began to say something."""
        self._first.observe(seconds)

    def generated(self, prompt_tokens: int, completion_tokens: int) -> None:
        """The policy read and wrote so many tokens."""
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("completion").inc(completion_tokens)

    def scored(self, captions: int) -> None:
        """The reward scored so many captions."""
        self._scored.inc(captions)

    def exposition(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)
