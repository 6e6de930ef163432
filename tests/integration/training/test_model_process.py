"""What needs the model before there are workers, in its process: what it gives, what it tells, how it is stopped."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mmrl_ray.config import Config
from mmrl_ray.errors import NonFiniteError, PlacementError, RunError
from mmrl_ray.training.interrupts import StopOnInterrupt
from mmrl_ray.training.model_process import ModelProcess, base_of
from mmrl_ray.training.warm_start import warm_start, warm_start_facts

from .conftest import Workplace

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def cfg(workplace: Workplace, tmp_path: Path) -> Config:
    settings = {"steps": 60, "batch_size": 4, "warmup_steps": 0, "cache": str(tmp_path / "cache")}
    resources = {"learner": {"cpus": 1, "threads": 1}}
    run = {"name": "apart", "root": str(tmp_path)}
    return Config.model_validate({**workplace.settings, "run": run, "sft": settings, "resources": resources})


def facts(*, say: Callable[[str], None]) -> dict[str, Any]:
    say("about to look")
    logging.getLogger("mmrl_ray.policy.load").warning("slow path")
    return {
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def diverge() -> None:
    raise NonFiniteError("warm start step 3: loss is nan")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def steps(*, progress: Callable[[int], None], say: Callable[[str], None]) -> None:
    """A loop that finishes its step, if it is let."""
    asked = threading.Event()
    with StopOnInterrupt(asked.set, awaited=lambda: "finishing step 1", say=say):
        try:
            progress(0)
            while not asked.wait(0.01):
                pass
            progress(1)
            for _ in range(6000):
                time.sleep(0.01)
        except KeyboardInterrupt:
            progress(2)
            raise


def test_it_is_another_process_that_ends_and_what_it_says_is_heard(
    cfg: Config, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    with ModelProcess(cfg, said.append) as process:
        found = process.call(facts, say=said.append)
        assert found["pid"] != os.getpid()
        assert found["threads"] == 1
        assert found["gpus"] == "", "who asked for no GPU sees none"
        with pytest.raises(NonFiniteError, match=r"^warm start step 3: loss is nan$"):
            process.call(diverge)
        assert process.call(facts, say=said.append)["pid"] == found["pid"], "an error ends no process"
    assert said == ["about to look"] * 2
    assert "slow path" in caplog.text
    psutil.wait_procs([psutil.Process(found["pid"])] if psutil.pid_exists(found["pid"]) else [], timeout=30)
    assert not psutil.pid_exists(found["pid"])
    with ModelProcess(cfg, said.append) as process, pytest.raises(RunError, match="is gone"):
        process.call(die)


def test_a_first_signal_lets_the_step_finish_and_a_second_stops_at_once(cfg: Config) -> None:
    said: list[str] = []
    seen: list[int] = []

    def user(done: int) -> None:
        seen.append(done)
        if done == 1:
            assert said == ["stopping: finishing step 1; Ctrl-C again stops at once"]
            time.sleep(1.1)  # what comes sooner is the same wish
        if done < 2:
            signal.raise_signal(signal.SIGTERM)

    with ModelProcess(cfg, said.append) as process, pytest.raises(KeyboardInterrupt):
        process.call(steps, progress=user, say=said.append)
    assert seen == [0, 1]


def test_a_warm_start_is_the_same_there_and_goes_on_where_it_was_stopped(cfg: Config, tmp_path: Path) -> None:
    assert cfg.sft is not None
    told: list[int] = []

    def user(done: int, total: int, figures: Any) -> None:
        told.append(done)
        if len(told) == 1:
            signal.raise_signal(signal.SIGINT)

    said: list[str] = []
    with ModelProcess(cfg, said.append) as process:
        heard = {"progress": user, "say": said.append}
        with pytest.raises(KeyboardInterrupt):
            process.call(base_of, cfg, None, **heard)
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".pt"], "what it goes on from, alone"
        made = process.call(base_of, cfg, None, **heard)
    assert told[0] == 1
    assert told[1] > 1, "what was done is not done again"
    assert "finishing step" in said[0]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = warm_start(cfg.model_copy(update={"sft": cfg.sft.model_copy(update={"cache": str(tmp_path / "here")})}))
    finally:
        torch.set_num_threads(before)
    mine, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (made.path, here))
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert warm_start_facts(made.path)["loss_last"] == warm_start_facts(here)["loss_last"]


def test_without_room_it_says_what_it_asked_for(cfg: Config) -> None:
    share = cfg.resources.learner.model_copy(update={"gpus": 1.0})
    resources = cfg.resources.model_copy(update={"learner": share, "placement_timeout_s": 1.0})
    process = ModelProcess(cfg.model_copy(update={"resources": resources}), print)
    with pytest.raises(PlacementError, match=r"not placed within 1 s: it asks for \{CPU: 1, GPU: 1\}"), process:
        pass
