"""What Prometheus would see of the project at a metrics port of Ray's."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from mmrl_ray.telemetry.table import METRICS, Metric

_RAYS_OWN = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}
_BY_SERIES = {series: metric for metric in METRICS for series in metric.series}


def exported(port: int) -> list[tuple[Metric, Sample]]:
    """The project's samples on a node of this machine; each has the labels that the table says, beside Ray's."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = []
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_mmrl_"):
                metric = _BY_SERIES[sample.name]
                own = {name for name in sample.labels if name not in _RAYS_OWN and not name.startswith("otel_")}
                assert own == set(metric.labels) | ({"le"} if sample.name.endswith("_bucket") else set()), sample
                found.append((metric, sample))
    return found
