"""`Meter`: what takes measurements. The base class keeps none, so that nobody has to ask whether one is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client import Gauge as PrometheusGauge
from prometheus_client import Histogram as PrometheusHistogram

from mmrl_ray.telemetry.table import Kind, Metric


class Meter:
    """Checks a measurement against the table and hands it to `record`, which does nothing here.

    Once a step, an assignment or a request, never once a token.
    """

    def __init__(self, **process: str) -> None:
        """`process` are labels of everything that is measured here: run, worker, rank, model."""
        self._process = process

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """Counts so many more; nothing of a 0."""
        if amount != 0:
            self._take(metric, "counter", amount, labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Sets a gauge; a figure that nobody measured (NaN) leaves it as it was."""
        self._take(metric, "gauge", value, labels)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Puts a value into its bucket."""
        self._take(metric, "histogram", value, labels)

    def watch(self, sample: Callable[[], None]) -> None:
        """Has `sample`, which measures what changes by itself, called every few seconds where somebody looks."""

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Keeps a measurement; `labels` are those of the metric, in its order."""

    def _take(self, metric: Metric, kind: Kind, value: float, labels: Mapping[str, str]) -> None:
        if metric.kind != kind:
            raise ValueError(f"{metric.name} is a {metric.kind}, and was measured as a {kind}")
        known = {name: self._process[name] for name in metric.labels if name in self._process} | dict(labels)
        if known.keys() != set(metric.labels):
            raise ValueError(f"{metric.name} has the labels {metric.labels}, and was given {tuple(known)}")
        if math.isfinite(value):
            self.record(metric, float(value), {name: known[name] for name in metric.labels})


class Totals:
    """Counters of what others count already: adds what has come since the last look."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._seen: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}

    def reach(self, metric: Metric, total: float, **labels: str) -> None:
        """The counter stands at `total` now; one that went back began anew."""
        key = (metric, tuple(sorted(labels.items())))
        before = self._seen.get(key, 0.0)
        self._seen[key] = total
        self._meter.add(metric, total - before if total >= before else total, **labels)


class PrometheusMeter(Meter):
    """Keeps its measurements in a registry of its own, for a process that answers `/metrics` itself."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, metrics: tuple[Metric, ...], **process: str) -> None:
        """`metrics` are all that it takes; each is shown from the start where it has no labels."""
        super().__init__(**process)
        self._registry = CollectorRegistry()
        self._made = {metric: self._make(metric) for metric in metrics}

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Puts a measurement into the registry."""
        made = self._made[metric]
        child = made.labels(**labels) if labels else made
        if isinstance(child, PrometheusCounter):
            child.inc(value)
        elif isinstance(child, PrometheusGauge):
            child.set(value)
        else:
            child.observe(value)

    def exposition(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)

    def _make(self, metric: Metric) -> PrometheusCounter | PrometheusGauge | PrometheusHistogram:
        if metric.kind == "counter":
            return PrometheusCounter(metric.name, metric.text, metric.labels, registry=self._registry)
        if metric.kind == "gauge":
            return PrometheusGauge(metric.name, metric.text, metric.labels, registry=self._registry)
        return PrometheusHistogram(
            metric.name, metric.text, metric.labels, buckets=metric.buckets, registry=self._registry
        )
