"""What stays on a cluster when a run has ended: nothing; and what a driver that was killed leaves on its Serve."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

from mmrl_ray.config import Config
from mmrl_ray.errors import ServingError
from mmrl_ray.processes import free_port
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.serving import launch
from mmrl_ray.training.serve_apps import LivePolicy
from tests.integration.serving.conftest import wait_for

LEAVES_NOTHING = """
import sys
from ray.util import list_named_actors
from mmrl_ray.rollouts.pool_settings import find_coordinator, register
from mmrl_ray.training.cluster import ray_at
from mmrl_ray.serving import launch
with ray_at(sys.argv[1], cpus=1, object_store_mb=None, namespace="run"):
    launch.start_serve()
    register("run", [])  # has the coordinator made, as Ray Train does
    assert find_coordinator() is not None
    print(sorted(actor["name"] for actor in list_named_actors(all_namespaces=True)), flush=True)
    launch.stop_serve()
"""


@pytest.mark.usefixtures("local_ray")
def test_a_run_on_a_cluster_takes_serve_and_coordinator_away_with_it() -> None:
    def there() -> set[str]:
        return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}

    def run_elsewhere() -> str:
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-c", LEAVES_NOTHING, address]
        return subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout

    before = there()
    # Ray may add that the controller was ended by its own task.
    assert run_elsewhere().splitlines()[0] == str(sorted(before | {"AutoscalingCoordinator", "SERVE_CONTROLLER_ACTOR"}))
    wait_for(lambda: there() == before, "end of what the run had made")
    # Serve and a coordinator that others began are theirs.
    serve.start(proxy_location="Disabled")
    coordinator = get_or_create_autoscaling_coordinator()
    ray.get(coordinator.cancel_request.remote("nobody"), timeout=30)
    try:
        theirs = there()
        run_elsewhere()
        assert there() == theirs
    finally:
        serve.shutdown()
        ray.kill(coordinator)


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
        return LivePolicy(cfg, run, cfg.model.path, joined=True)

    live("mine").__enter__()  # and its driver is killed
    (app,) = serve.status().applications
    assert app.startswith("live-r-")
    with pytest.raises(ServingError, match=rf'Prefix / is being used by application "{app}".*Stop that one first'):
        live("other").__enter__()
    with live("mine"):
        assert set(serve.status().applications) == {app}
    assert not launch.serve_is_running()
