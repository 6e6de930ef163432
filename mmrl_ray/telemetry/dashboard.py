"""The Grafana dashboard. The shipped one is written by

python -m mmrl_ray.telemetry.dashboard > deploy/grafana/mmrl_ray.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mmrl_ray.telemetry.panels import ROWS, Panel

_COLUMNS = 3
_WIDTH, _HEIGHT = 24 // _COLUMNS, 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    return {
        "title": "mmrl_ray",
        "uid": "mmrl-ray",
        "tags": ["mmrl_ray", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                _variable("run", "Run", "label_values(ray_mmrl_finished_steps, run)"),
                _variable("model", "Served model", "label_values(ray_mmrl_policy_running_rows, model)"),
            ]
        },
        "panels": list(_panels()),
    }


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for title, panels in ROWS:
        number += 1
        place = {"x": 0, "y": top, "w": 24, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        top += 1
        for i, panel in enumerate(panels):
            number += 1
            place = {"x": i % _COLUMNS * _WIDTH, "y": top + i // _COLUMNS * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            yield _graph(panel, number, place)
        top += -(-len(panels) // _COLUMNS) * _HEIGHT


def _graph(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    style: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 30 if panel.stacked else 0, "spanNulls": True}
    style["stacking"] = {"mode": "normal" if panel.stacked else "none"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": style}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
            for i, (query, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1, ensure_ascii=False))
