"""Pictures while a run learns: fixed ones captioned anew, fresh ones out of the rollout log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmrl_ray.rollouts.group_codec import open_payload
from mmrl_ray.run_records.samples import load_samples, sample_steps
from mmrl_ray.tracking.pictures import PictureTaker
from tests.unit.rollouts.fakes import samples
from tests.unit.rollouts.test_controller import World, make, until

__all__ = ["make"]
TRACKING: Mapping[str, Any] = {"samples_every": 2, "fixed_pictures": 2, "fresh_pictures": 3}


class Here:
    """A controller's client without Ray."""

    def __init__(self, world: World) -> None:
        self._controller = world.controller

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self._controller, method)(*arguments, **options)

    def status(self) -> dict[str, Any]:
        return self._controller.status()

    def groups(self, payloads: Sequence[Any]) -> list[Any]:
        return [open_payload(payload, lambda value: value) for payload in payloads]


@pytest.fixture
def world(make: Callable[..., World]) -> World:
    found = make(tracking=TRACKING)
    found.controller.rewind(0)
    return found


def test_the_best_and_worst_captions_of_fixed_and_fresh_pictures(world: World) -> None:
    held_out = samples(50)[45:]
    client: Any = Here(world)
    with PictureTaker(world.cfg, world.run, held_out, client):
        for step in range(2):
            world.step(step)
        until(lambda: sample_steps(world.run) == [2])
        for step in range(2, 4):
            world.step(step)
        until(lambda: sample_steps(world.run) == [2, 4])
    rows = world.run.local_path("rollouts/step-000003.parquet")
    logged = duckdb_rows(rows)
    found = load_samples(world.run, 4)
    assert found["policy_version"] == 4
    assert sorted(found["rewards"]["reward"]) == sorted(reward for *_, reward in logged)
    fixed, fresh = ([p for p in found["pictures"] if p["kind"] == kind] for kind in ("fixed", "fresh"))
    assert [each["sample"] for each in fixed] == [sample.id for sample in held_out[:2]]
    assert all(each["best"]["reward"] >= each["worst"]["reward"] for each in [*fixed, *fresh])
    assert len(fresh) == 3
    best, worst = max(logged, key=lambda row: row[-1]), min(logged, key=lambda row: row[-1])
    assert (best[0], best[1], best[2]) == (fresh[0]["sample"], fresh[0]["best"]["caption"], fresh[0]["best"]["reward"])
    assert worst[2] == min(each["worst"]["reward"] for each in fresh)
    for each in found["pictures"]:
        (image,) = each["images"]
        assert world.run.exists(f"images/{image}")
    asked = {a.id: a for a in world.pool.submitted if a.kind == "eval"}
    assert {a.version for a in asked.values()} >= {2, 4}


def duckdb_rows(file: Path) -> list[tuple[str, str, float]]:
    import duckdb

    told = f"select sample_id, caption, reward from '{file}' where completion >= 0 and reward is not null"
    return duckdb.sql(told).fetchall()


def test_a_resume_does_not_look_again_at_what_it_does_again(world: World, make: Callable[..., World]) -> None:
    client: Any = Here(world)
    with PictureTaker(world.cfg, world.run, samples(3), client):
        for step in range(3):
            world.step(step)
        until(lambda: sample_steps(world.run) == [2])
        before = load_samples(world.run, 2)
        world.controller.rewind(0)
        for step in range(4):
            world.step(step)
        until(lambda: sample_steps(world.run) == [2, 4])
    assert load_samples(world.run, 2) == before
