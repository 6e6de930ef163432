"""What the gateway counts for Prometheus: in a registry of its own, which `/metrics` shows, and once more for Ray."""

from __future__ import annotations

from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.meter import Meter, PrometheusMeter

_METHODS = frozenset(("GET", "HEAD", "POST", "OPTIONS"))
_METRICS = tuple(metric for metric in table.METRICS if metric.name.startswith("mmrl_gateway_"))


class GatewayMetrics:
    """One replica's numbers. Labels hold route templates, never what a client wrote: their number is fixed."""

    content_type = PrometheusMeter.content_type

    def __init__(self, meter: Meter | None = None) -> None:
        """`meter` takes the same measurements as `/metrics`."""
        self._own = PrometheusMeter(_METRICS)
        self._meters = (self._own, meter or Meter())
        self._under_way = 0

    def began(self) -> None:
        """A request is here."""
        self._count(1)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request that `began` is over."""
        self._count(-1)
        method = method if method in _METHODS else "other"
        for meter in self._meters:
            meter.add(table.GATEWAY_REQUESTS, method=method, route=route, status=str(status))
            meter.observe(table.GATEWAY_SECONDS, seconds, route=route)

    def first_token(self, seconds: float) -> None:
        """A streamed answer began to say something."""
        for meter in self._meters:
            meter.observe(table.GATEWAY_FIRST_TOKEN, seconds)

    def generated(self, prompt_tokens: int, completion_tokens: int) -> None:
        """The policy read and wrote so many tokens."""
        for meter in self._meters:
            meter.add(table.GATEWAY_TOKENS, prompt_tokens, kind="prompt")
            meter.add(table.GATEWAY_TOKENS, completion_tokens, kind="completion")

    def scored(self, captions: int) -> None:
        """The reward scored so many captions."""
        for meter in self._meters:
            meter.add(table.GATEWAY_SCORED, captions)

    def exposition(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return self._own.exposition()

    def _count(self, more: int) -> None:
        self._under_way += more
        for meter in self._meters:
            meter.set(table.GATEWAY_UNDER_WAY, self._under_way)
