"""How many learners fit beside the rest of a run, and the deadline while too few do."""

from __future__ import annotations

from typing import Any

import pytest

from mmrl_ray.config import Config
from mmrl_ray.errors import PlacementError
from mmrl_ray.learner import group
from mmrl_ray.learner.group import Room, learners_that_fit, others

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
