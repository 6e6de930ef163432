"""What a run's driver leaves in the run folder for those who watch it: events of its own, and where its metrics are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from mmrl_ray.run_dir import RunDir

EVENTS = "events.jsonl"
TARGETS = "prometheus.json"
"""In the form of Prometheus's file-based service discovery: `file_sd_configs: [{files: [runs/*/prometheus.json]}]`."""


def note_event(run: RunDir, kind: str, **more: Any) -> None:
    """A line of `events.jsonl`.

    Raises:
        RunError: it cannot be written.
    """
    run.append_line(EVENTS, {"time": time.time(), "kind": kind, **more})


@contextmanager
def scrape_targets(run: RunDir) -> Iterator[None]:
    """Says where Prometheus finds the metrics of Ray's nodes, while the block lasts.

    Nodes that come later are in Ray's own list, which the head of a cluster keeps.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
    run.write_json(TARGETS, [{"targets": targets, "labels": {"job": "mmrl_ray"}}])
    try:
        yield
    finally:
        run.delete(TARGETS)
