"""Learners and rollout workers that share GPUs, on nodes that say they have some: who lands where, and stays there."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import ray
import ray.train
from ray.train.torch import TorchConfig
from ray.util.placement_group import PlacementGroup

from mmrl_ray.config import Config
from mmrl_ray.errors import PlacementError
from mmrl_ray.learner import group as group_module
from mmrl_ray.learner.group import LearnerGroup
from mmrl_ray.learner.job import LearnerJob, LearnerOutcome
from mmrl_ray.rollouts.pool import RayWorkerPool
from mmrl_ray.rollouts.pool_settings import PoolSettings, shared_gpus
from mmrl_ray.run_records.run_dir import RunDir
from tests.support.local_ray import local_ray

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Noting:
    """An engine factory that notes its GPU."""

    folder: Path

    def __call__(self, worker: str) -> Any:
        note(self.folder / worker)
        return object()


def note(file: Path) -> None:
    file.write_text(" ".join(map(str, ray.get_gpu_ids())))


def noting_loop(arguments: dict[str, Any]) -> LearnerOutcome:
    """Stands in for the learners' loop; the first group of them dies."""
    job: LearnerJob = arguments["job"]
    rank = ray.train.get_context().get_world_rank()
    folder = Path(job.run.full_path())
    attempt = sum(file.name.startswith(f"learner-{rank}-") for file in folder.iterdir())
    note(folder / f"learner-{rank}-{attempt}")
    if attempt == 0 and job.cfg.learner.max_failures:
        raise RuntimeError("as if a node were lost")
    return LearnerOutcome(step=1, finished=True, reason="")


@pytest.fixture(scope="module", params=[2, 4])
def gpus(request: pytest.FixtureRequest) -> Iterator[int]:
    with local_ray(cpus=2 * request.param, gpus=request.param):
        yield request.param


def config(learners: int, **learner: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "shared"},
            "model": {"path": "unused"},
            "data": {"train": "unused"},
            "rollout": {"workers": learners},
            "learner": {"steps": 1, "workers": learners, **learner},
            "resources": {
                "learner": {"cpus": 1, "gpus": 0.51},
                "rollout": {"cpus": 1, "gpus": 0.49},
                "placement_timeout_s": 60,
            },
        }
    )


def ready(pool: RayWorkerPool, count: int) -> None:
    deadline = time.monotonic() + 120
    while pool.status()["ready"] < count:
        pool.poll(0.1)
        time.sleep(0.05)
        assert time.monotonic() < deadline, pool.status()


def on(folder: Path, names: str) -> Counter[str]:
    """How many of those files name each GPU."""
    return Counter(file.read_text() for file in folder.glob(names))


def test_each_gpu_has_one_learner_and_one_worker_also_after_they_died(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_module, "train_loop", noting_loop)
    monkeypatch.setattr(group_module, "TorchConfig", partial(TorchConfig, backend="gloo"))  # the GPUs are none
    failures = 1 if gpus == 2 else 0
    cfg = config(gpus, max_failures=failures)
    each = Counter({str(gpu): 1 for gpu in range(gpus)})
    with shared_gpus(cfg) as bundles:
        assert isinstance(bundles, PlacementGroup)
        pool = RayWorkerPool("shared", Noting(tmp_path), PoolSettings.of(cfg, bundles))
        try:
            ready(pool, gpus)  # the workers come first, and leave the learners their place
            assert on(tmp_path, "worker-*") == each
            if failures:
                before = (tmp_path / "worker-0").read_text()
                os.kill(pool.status()["workers"]["worker-0"]["pid"], 9)
                while "worker-0" in pool.status()["workers"]:
                    pool.poll(0.1)
                ready(pool, gpus)
                assert (tmp_path / f"worker-{gpus}").read_text() == before, "on the GPU of the one it replaces"
            run = RunDir.create(tmp_path, "run")
            learners = LearnerGroup(cfg, run, cast(Any, None), bundles)
            learners.start()
            assert learners.wait(200)
            assert learners.result().finished
            for attempt in range(failures + 1):
                assert on(tmp_path / "run", f"learner-*-{attempt}") == each
            assert pool.status()["ready"] == gpus, "the end of the learners leaves the workers theirs"
        finally:
            pool.close()


def test_without_room_it_says_what_one_gpu_is_to_hold(gpus: int) -> None:
    cfg = config(gpus + 1)
    cfg = cfg.model_copy(update={"resources": cfg.resources.model_copy(update={"placement_timeout_s": 1.0})})
    with (
        pytest.raises(PlacementError, match=rf"^{gpus + 1} learners .* asks for \{{CPU: 2, GPU: 1\}}, the cluster has"),
        shared_gpus(cfg),
    ):
        pass
