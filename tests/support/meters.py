"""A meter that remembers, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmrl_ray.telemetry.meter import Meter
from mmrl_ray.telemetry.table import Metric


class MemoryMeter(Meter):
    """Counters summed, gauges as last set, histograms as lists; keys are (name, label values in their order)."""

    def __init__(self, **process: str) -> None:
        super().__init__(**process)
        self.values: dict[tuple[str, ...], float] = {}
        self.observed: dict[tuple[str, ...], list[float]] = {}
        self.watched: list[Callable[[], None]] = []

    def watch(self, sample: Callable[[], None]) -> None:
        self.watched.append(sample)

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        key = (metric.name.removeprefix("mmrl_"), *labels.values())
        if metric.kind == "histogram":
            self.observed.setdefault(key, []).append(value)
        elif metric.kind == "counter":
            self.values[key] = self.values.get(key, 0.0) + value
        else:
            self.values[key] = value
