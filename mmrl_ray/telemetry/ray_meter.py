"""`RayMeter`: measurements of a process of Ray's, through `ray.util.metrics` and each node's agent, to Prometheus.

Recording is local and takes some microseconds; Ray sends what was recorded to the agent every ten seconds. The agent
forgets a gauge that was not set for twice that long, and a step may take longer: a thread sets every gauge again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ray.util import metrics as ray_metrics

from mmrl_ray.telemetry.meter import Meter
from mmrl_ray.telemetry.table import Metric

logger = logging.getLogger(__name__)

_BEAT_S = 5.0


class RayMeter(Meter):
    """A `Meter` that never stops whoever measures: what Ray refuses is said once in the log, and left out."""

    def __init__(self, *, beat_s: float = _BEAT_S, **process: str) -> None:
        """`beat_s` is how often gauges are set again and what is watched is looked at."""
        super().__init__(**process)
        self._beat_s = beat_s
        self._made: dict[Metric, Any] = {}
        self._gauges: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}
        self._watched: list[Callable[[], None]] = []
        self._complained: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Hands a measurement to Ray; a gauge is also kept, to be set again."""
        if metric.kind == "gauge":
            with self._lock:
                self._gauges[(metric, tuple(labels.items()))] = value
            self._begin()
        self._hand_over(metric, value, labels)

    def watch(self, sample: Callable[[], None]) -> None:
        """Has `sample` called every `beat_s`."""
        with self._lock:
            self._watched.append(sample)
        self._begin()

    def close(self) -> None:
        """Ends the thread; gauges are gone from Prometheus soon after."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(self._beat_s)

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._beat, name="metrics", daemon=True)
                self._thread.start()

    def _beat(self) -> None:
        while not self._closed.wait(self._beat_s):
            with self._lock:
                watched, gauges = list(self._watched), list(self._gauges.items())
            for sample in watched:
                try:
                    sample()
                except Exception as error:  # noqa: BLE001 - whoever is watched may be at its end; a look is not worth a run
                    self._complain("what is watched", error)
            for (metric, labels), value in gauges:
                self._hand_over(metric, value, dict(labels))

    def _hand_over(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        try:
            with self._lock:
                if metric not in self._made:
                    self._made[metric] = _instrument(metric)
            made = self._made[metric]
            take = {"counter": "inc", "gauge": "set", "histogram": "observe"}[metric.kind]
            getattr(made, take)(value, dict(labels))
        except Exception as error:  # noqa: BLE001 - the boundary to Ray's agent: metrics never stop a run
            self._complain(metric.name, error)

    def _complain(self, what: str, error: Exception) -> None:
        if what not in self._complained:
            self._complained.add(what)
            logger.warning("metrics: %s is not measured: %s: %s", what, type(error).__name__, error)


def _instrument(metric: Metric) -> ray_metrics.Metric:
    if metric.kind == "counter":
        return ray_metrics.Counter(metric.name, metric.text, metric.labels)
    if metric.kind == "gauge":
        return ray_metrics.Gauge(metric.name, metric.text, metric.labels)
    return ray_metrics.Histogram(metric.name, metric.text, list(metric.buckets), metric.labels)
