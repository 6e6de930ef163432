"""Ray's settings, without starting a Ray."""

from __future__ import annotations

import pytest
import ray
from ray._private.auto_init_hook import auto_init_ray

from mmrl_ray.runs.cluster import configure_ray


def test_a_late_call_starts_no_ray_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    monkeypatch.setattr(ray, "init", lambda: started.append(True))
    configure_ray()
    auto_init_ray()
    assert not started
