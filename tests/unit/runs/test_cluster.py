"""Ray's settings, without starting a Ray."""

from __future__ import annotations

import pytest
import ray
from ray._private.auto_init_hook import auto_init_ray

from mmrl_ray.errors import RunError
from mmrl_ray.runs.cluster import configure_ray, node_local_root_refused


def test_a_late_call_starts_no_ray_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    monkeypatch.setattr(ray, "init", lambda: started.append(True))
    configure_ray()
    auto_init_ray()
    assert not started


def test_a_local_root_is_refused_where_other_machines_would_not_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nodes(*addresses: str) -> None:
        found = [{"Alive": True, "NodeManagerAddress": address} for address in addresses]
        monkeypatch.setattr(ray, "nodes", lambda: found)

    nodes("10.0.0.1", "10.0.0.1", "10.0.0.1")  # several nodes of one machine see the same disk
    node_local_root_refused("runs")
    nodes("10.0.0.1", "10.0.0.2")
    with pytest.raises(RunError, match=r"root=runs is a path on this node, but the cluster has nodes on 2 machines"):
        node_local_root_refused("runs")
    node_local_root_refused("s3://bucket/runs")
