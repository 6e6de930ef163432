"""The table of metrics: well-formed names, and every row measured by the code somewhere."""

from __future__ import annotations

import re
from pathlib import Path

from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.table import METRICS

ROOT = Path(__file__).parents[3]
LABELS = {"run", "worker", "rank", "model", "part", "term", "name", "phase", "kind", "state", "outcome", "result"} | {
    "method",
    "route",
    "status",
}


def test_names_are_prometheus_names_once_each() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names)) > 50
    series = [name for metric in METRICS for name in metric.series]
    assert len(series) == len(set(series))
    for metric in METRICS:
        assert re.fullmatch(r"mmrl_[a-z]+(_[a-z]+)*", metric.name)
        assert not metric.name.endswith(("_total", "_bucket", "_count", "_sum"))  # Ray adds these
        assert set(metric.labels) <= LABELS
        assert metric.text
        assert metric.text[0].isupper()
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert metric.kind != "histogram" or metric.name.endswith("_seconds")
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_every_metric_is_measured_somewhere() -> None:
    code = "\n".join(
        path.read_text() for path in (ROOT / "mmrl_ray").rglob("*.py") if path.name not in ("table.py", "panels.py")
    )
    constants = [name for name, value in vars(table).items() if isinstance(value, table.Metric)]
    assert len(constants) == len(METRICS)
    assert [name for name in constants if not re.search(rf"\btable\.{name}\b", code)] == []


def test_series_are_what_ray_makes_of_a_name() -> None:
    assert table.LOSS.series == {"ray_mmrl_loss"}
    assert table.GROUPS.series == {"ray_mmrl_groups_total"}
    ends = ("bucket", "count", "sum")
    assert table.STEP_SECONDS.series == {f"ray_mmrl_step_seconds_{end}" for end in ends}


def test_descriptions_are_what_ray_can_take() -> None:
    """It encodes them as ASCII, and a metric whose description it cannot encode is not measured at all."""
    assert [metric.name for metric in METRICS if not metric.text.isascii()] == []
