"""How many learners fit beside the rest of a run, the deadline while too few do, and the wait for their end."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmrl_ray.config import Config
from mmrl_ray.errors import PlacementError
from mmrl_ray.learner import group
from mmrl_ray.learner.group import LearnerGroup, Room, learners_that_fit, others
from mmrl_ray.run_records.run_dir import RunDir

BIG: dict[str, float] = {"CPU": 8.0, "GPU": 4.0, "memory": 1e9}


@pytest.mark.parametrize(
    ("nodes", "taken", "learner", "fit"),
    [
        ([BIG], [], {"CPU": 1.0, "GPU": 1.0}, 4),
        ([BIG], [{"GPU": 1.0}] * 3, {"CPU": 1.0, "GPU": 1.0}, 1),
        ([BIG, BIG], [{"GPU": 1.0}] * 5, {"CPU": 1.0, "GPU": 1.0}, 3),
        ([BIG], [{"CPU": 1.0}] * 7, {"CPU": 1.0, "GPU": 1.0}, 1),
        ([{"CPU": 8.0}], [], {"CPU": 1.0, "GPU": 1.0}, 0),
        ([{"CPU": 3.0}, {"CPU": 3.0}], [], {"CPU": 2.0}, 2),
        ([{"CPU": 1.0}], [{"CPU": 0.3}] * 2, {"CPU": 0.2}, 2),
        ([BIG], [], {}, 5),
        ([BIG, BIG], [], {"CPU": 1.0}, 5),
        ([{"CPU": 2.0}], [{"GPU": 1.0}], {"CPU": 1.0}, 2),
    ],
)
def test_room_is_what_whole_nodes_have_beside_the_others(nodes: Any, taken: Any, learner: Any, fit: int) -> None:
    assert learners_that_fit(nodes, taken, learner, most=5) == fit
    assert BIG == {"CPU": 8.0, "GPU": 4.0, "memory": 1e9}, "what Ray said was changed"


def config(**resources: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r"},
            "model": {"path": "m"},
            "data": {"train": "d"},
            "rollout": {"workers": 2},
            "learner": {"steps": 1, "workers": {"min": 2, "max": 4}},
            "resources": {"placement_timeout_s": 30.0, **resources},
        }
    )


def test_others_are_rollout_workers_and_the_reward() -> None:
    assert [(d.count, d.bundle) for d in others(config())] == [(2, {"CPU": 1.0})]
    split = config(rollout={"gpus": 0.5}, reward={"cpus": 2.0})
    assert [(d.count, d.bundle) for d in others(split)] == [(2, {"CPU": 1.0, "GPU": 0.5}), (1, {"CPU": 2.0})]


def test_too_little_room_for_too_long_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now, nodes = [0.0], [{"Alive": True, "Resources": {"CPU": 4.0}}]
    monkeypatch.setattr(group.ray, "nodes", lambda: nodes)
    room = Room(config(), clock=lambda: now[0])

    def at(second: float, cpus: float) -> None:
        now[0], nodes[0]["Resources"] = second, {"CPU": cpus}
        room.check()

    at(0, 4)
    at(10, 4)
    at(12, 3)  # room for one of the two is gone
    at(39, 3)
    at(39.5, 4)  # it came back in time
    at(50, 3)
    at(69, 3)
    with pytest.raises(
        PlacementError, match=r"2 learners with 1 CPUs .* room for 1 beside the rollout workers for 30 s"
    ):
        at(69.5, 3)


@pytest.mark.parametrize(
    ("workers", "counts"), [(3, (3, 3)), ({"min": 1, "max": 4}, (1, 4)), ({"min": 2, "max": 2}, (2, 2))]
)
def test_a_number_is_a_range_of_one(workers: Any, counts: tuple[int, int]) -> None:
    learner = Config.model_validate({**config().model_dump(), "learner": {"steps": 1, "workers": workers}}).learner
    assert (learner.min_workers, learner.max_workers) == counts


@pytest.mark.parametrize("ends", [True, False])
def test_the_end_of_a_group_is_waited_for_and_what_is_awaited_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, ends: bool
) -> None:
    """Its thread is in a call of Ray's, under which nobody may end Ray: a slow one ends after it was told of."""
    over = threading.Event()

    class Telling(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if ends and "waiting for the learner group to end" in record.getMessage():
                over.set()

    monkeypatch.setattr(group, "_TELL_S", 0.05)
    monkeypatch.setattr(group.ray, "nodes", lambda: [{"Alive": True}])
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    fitting = SimpleNamespace(fit=lambda: over.wait(60) and SimpleNamespace(return_value=None))
    monkeypatch.setattr(LearnerGroup, "_trainer", lambda self: fitting)
    telling = Telling()
    group.logger.addHandler(telling)
    cfg = config()
    cfg = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"workers": 1})})
    learners = LearnerGroup(cfg, RunDir.create(tmp_path, "r"), None)  # type: ignore[arg-type]
    try:
        learners.start()
        learners.close(60.0 if ends else 0.2)
        assert learners._thread.is_alive() != ends
        said = [message for message in caplog.messages if "the learner group did not end within 0.2 s" in message]
        assert bool(said) != ends
    finally:
        group.logger.removeHandler(telling)
        over.set()
        learners.close(60.0)
