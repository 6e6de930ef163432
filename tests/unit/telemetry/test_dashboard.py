"""The shipped Grafana dashboard: its queries parse, and ask for what the code exports, by the labels that it has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest

from mmrl_ray.telemetry.table import METRICS, Metric

SHIPPED = Path(__file__).parents[3] / "deploy/grafana/mmrl_ray.json"
BY_SERIES = {series: metric for metric in METRICS for series in metric.series}
UNUSED: set[str] = set()
"""Metrics that are exported and deliberately on no panel."""


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(SHIPPED.read_text())["panels"] if panel["type"] != "row"]


QUERIES = [
    (panel["title"], target["expr"], target["legendFormat"]) for panel in panels() for target in panel["targets"]
]


def parse(query: str) -> Any:
    """What Prometheus would get: Grafana fills its variables in first."""
    filled = query.replace("$__rate_interval", "1m").replace("$run", "a").replace("$model", "b")
    assert "$" not in filled, "a variable that the dashboard does not have"
    return promql.parse(filled)


def nodes(node: Any) -> list[Any]:
    """A query's parts, itself first."""
    found = [node]
    for name in ("expr", "lhs", "rhs", "vector_selector", "args"):
        inner = getattr(node, name, None)
        for each in inner if isinstance(inner, list) else [inner] if inner is not None else []:
            found += nodes(each)
    return found


def selectors(query: str) -> list[Any]:
    return [node for node in nodes(parse(query)) if isinstance(node, promql.VectorSelector)]


def labels_of(series: str, metric: Metric) -> set[str]:
    return set(metric.labels) | ({"le"} if series.endswith("_bucket") else set())


@pytest.mark.parametrize(("title", "query", "legend"), QUERIES, ids=[f"{t}-{i}" for i, (t, _, _) in enumerate(QUERIES)])
def test_a_query_asks_for_what_is_exported(title: str, query: str, legend: str) -> None:
    found = selectors(query)
    assert found, "a query without a metric"
    known: set[str] = set()
    for selector in found:
        assert selector.name in BY_SERIES, f"{title}: nothing exports {selector.name}"
        labels = labels_of(selector.name, BY_SERIES[selector.name])
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels
        if "run" in labels:
            assert any(matcher.name == "run" for matcher in selector.matchers.matchers), "the choice of runs is ignored"
        known |= labels
    kept: set[str] = set()
    for node in nodes(parse(query)):
        if isinstance(node, promql.AggregateExpr):
            kept = set(node.modifier.labels) if node.modifier is not None else set()
            assert kept <= known, f"{title}: {kept - known} is no label of it"
            break
    assert set(re.findall(r"{{(\w+)}}", legend)) <= kept, "the legend names what the query has summed away"


@pytest.mark.parametrize(("title", "query", "legend"), QUERIES, ids=[f"{t}-{i}" for i, (t, _, _) in enumerate(QUERIES)])
def test_counters_are_rated_or_totals_and_buckets_are_for_quantiles(title: str, query: str, legend: str) -> None:
    for selector in selectors(query):
        metric = BY_SERIES[selector.name]
        rated = "rate(" in query
        assert metric.kind != "gauge" or not rated, f"{title}: the rate of a gauge says nothing"
        assert metric.kind != "histogram" or (rated and "histogram_quantile(" in query)
        # Ray makes a histogram's sum out of the middles of its buckets.
        assert not selector.name.endswith("_seconds_sum")


def test_every_metric_is_on_a_panel() -> None:
    asked = {BY_SERIES[selector.name].name for _, query, _ in QUERIES for selector in selectors(query)}
    assert {metric.name for metric in METRICS} - asked == UNUSED


def test_rows_and_places() -> None:
    shipped = json.loads(SHIPPED.read_text())
    assert [p["title"] for p in shipped["panels"] if p["type"] == "row"] == [
        "Learning",
        "Rollouts",
        "Learner",
        "Workers",
        "Serving",
    ]
    numbers = [panel["id"] for panel in shipped["panels"]]
    assert len(numbers) == len(set(numbers))
    taken: set[tuple[int, int]] = set()
    for panel in shipped["panels"]:
        place = panel["gridPos"]
        x, y, w, h = (place[side] for side in "xywh")
        cells = {(x + i, y + j) for i in range(w) for j in range(h)}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert x + w <= 24
        taken |= cells


def test_the_parser_refuses_what_prometheus_would() -> None:
    for broken in ("sum by (run (x)", "rate(x)", "histogram_quantile(0.5)"):
        with pytest.raises(ValueError, match=r".+"):
            promql.parse(broken)
