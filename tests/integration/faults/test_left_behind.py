"""What a driver that was killed leaves on a cluster's Serve: its own run takes it over, others are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray import serve

from mmrl_ray.config import Config
from mmrl_ray.errors import ServingError
from mmrl_ray.run_dir import RunDir
from mmrl_ray.runs.live_policy import LivePolicy
from tests.integration.serving.conftest import free_port, wait_for


@pytest.mark.usefixtures("local_ray")
def test_a_live_policy_that_was_left_behind_is_taken_over(tmp_path: Path) -> None:
    port = free_port()

    def live(root: str) -> LivePolicy:
        sections = {
            "run": {"name": "r", "root": str(tmp_path / root)},
            "model": {"path": str(tmp_path / "none")},
            "data": {"train": "none"},
            "learner": {"steps": 1},
            "serving": {"live_policy": True, "port": port, "database": f"sqlite:///{tmp_path}/keys.db"},
        }
        cfg = Config.model_validate(sections)
        run = RunDir.at(tmp_path / root / "r") if (tmp_path / root).exists() else RunDir.create(tmp_path / root, "r")
        return LivePolicy(cfg, run, cfg.model.path)

    live("mine").__enter__()  # and its driver is killed
    (app,) = serve.status().applications
    assert app.startswith("live-r-")
    with pytest.raises(ServingError, match=rf'Prefix / is being used by application "{app}".*Stop that one first'):
        live("other").__enter__()
    with live("mine"):
        assert set(serve.status().applications) == {app}
    wait_for(lambda: not serve.status().applications, "end of the application")
    serve.shutdown()
