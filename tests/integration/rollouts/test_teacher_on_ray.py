"""A teacher in a process of its own: the same numbers as here, also after it was lost; and no room for one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from mmrl_ray.errors import AdapterError, PlacementError
from mmrl_ray.rollouts.teacher import Teacher, teachers
from tests.unit.algorithms.test_distill import larger
from tests.unit.learner.worlds import make_groups, make_policy, tiny_folder
from tests.unit.rollouts.fakes import config

pytestmark = pytest.mark.usefixtures("local_ray")


def distilling(tmp_path: Path, **sections: Any) -> Any:
    teacher = {"path": str(larger(tmp_path)), "dtype": "float32", "workers": 2, **sections.pop("teacher", {})}
    return config(
        tmp_path,
        learner={"loss": "distill"},
        teacher=teacher,
        resources={"teacher": {"cpus": 0.5, "threads": 1}, **sections.pop("resources", {})},
        **sections,
    )


def test_it_scores_as_it_does_here_and_comes_back_when_it_was_lost(tmp_path: Path) -> None:
    cfg = distilling(tmp_path)
    assert cfg.teacher is not None
    groups = make_groups(make_policy(tiny_folder(tmp_path / "student")))
    asked = [g.sample for g in groups], [[c.token_ids for c in g.completions] for g in groups], 0.8
    torch.set_num_threads(1)
    expected = Teacher(cfg.teacher, device="cpu").logprobs(*asked)
    with teachers(cfg) as client:
        assert client is not None
        for turn in range(4):
            if turn == 2:  # both of them, at their next question
                for handle in client.handles:
                    os.kill(ray.get(handle.__ray_call__.remote(lambda actor: os.getpid())), signal.SIGKILL)
            for found, rows in zip(client.logprobs(*asked), expected, strict=True):
                assert [row.tolist() for row in found] == [row.tolist() for row in rows]
        pids = [ray.get(handle.__ray_call__.remote(lambda actor: os.getpid())) for handle in client.handles]
        assert len(set(pids)) == 2
    deadline = time.monotonic() + 60
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < deadline, "teachers outlived the run"
        time.sleep(0.1)


def test_one_that_cannot_be_loaded_or_placed_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(AdapterError, match="nothing is not an adapter"),
        teachers(distilling(tmp_path, teacher={"adapter": str(tmp_path / "nothing")})),
    ):
        pass
    share = {"teacher": {"cpus": 99.0}, "placement_timeout_s": 1.0}
    with (
        pytest.raises(PlacementError, match=r"2 teachers were not placed .* one asks for \{CPU: 99\}"),
        teachers(distilling(tmp_path / "b", resources=share)),
    ):
        pass
