"""Who may set how many workers, what the status status writer answers, and what it survives."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mmrl_ray.config.learner import RolloutSection
from mmrl_ray.config.schema import Demand
from mmrl_ray.errors import ConfigError, RolloutError, RunError
from mmrl_ray.rollouts.pool_settings import Nodes, PoolSettings, Quorum
from mmrl_ray.rollouts.scaling import STEPS, Scaling
from mmrl_ray.run_records.control_files import (
    ScaleRequest,
    StatusWriter,
    conclude_status,
    put_request,
    read_status,
    take_answer,
    write_status,
)
from mmrl_ray.run_records.run_dir import RunDir
from tests.unit.rollouts.fakes import config
from tests.unit.rollouts.test_controller import World, until


def scaling(tmp_path: Path, **rollout: Any) -> tuple[Scaling, list[int]]:
    asked: list[int] = []
    return Scaling(config(tmp_path, rollout=rollout), asked.append), asked


def line(step: int, *, wait: float, idle: float) -> dict[str, float]:
    return {"step": step, "seconds/step": 2.0, "seconds/wait_plan": wait, "seconds/workers_idle": idle}


def test_a_range_begins_with_its_least() -> None:
    section = RolloutSection.model_validate({"workers": {"min": 2, "max": 5}})
    assert (section.first_workers, section.most_workers) == (2, 5)
    assert (RolloutSection(workers=3).first_workers, RolloutSection(workers=3).most_workers) == (3, 3)
    for wrong in ({"min": 3, "max": 2}, {"min": 0, "max": 2}, {"min": 1}, 0, "2"):
        with pytest.raises(ValidationError):
            RolloutSection.model_validate({"workers": wrong})
    with pytest.raises(ValidationError, match="min_workers=2 is above workers=1"):
        RolloutSection.model_validate({"workers": {"min": 1, "max": 5}, "min_workers": 2})


def test_nodes_hold_all_actors_of_the_run_but_the_learners_who_ask_for_themselves(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "reward": {"host": "serve"},
        "resources": {"rollout": {"cpus": 0.5, "node_labels": {"pool": "a"}}, "reward": {"cpus": 2.0}},
    }

    def asked(workers: int, **more: Any) -> list[tuple[str, int, dict[str, float]]]:
        demands = PoolSettings.of(config(tmp_path, **sections, **more)).demands(workers)
        return [(d.kind, d.count, d.bundle) for d in demands]

    assert asked(3) == [("rollout", 3, {"CPU": 0.5}), ("reward", 1, {"CPU": 2.0})]
    # Learners that take what room there is must leave that of the workers that may yet come.
    grow = {"learner": {"workers": {"min": 1, "max": 4}}, "rollout": {"workers": {"min": 1, "max": 5}}}
    assert asked(3, **grow)[0] == ("rollout", 5, {"CPU": 0.5})
    assert asked(6, **grow)[0] == ("rollout", 6, {"CPU": 0.5})


def test_a_number_is_kept_within_what_the_run_can_do_with(tmp_path: Path) -> None:
    fixed, asked = scaling(tmp_path, workers=2, min_workers=2)
    assert fixed.request(4, "me") == (
        "2 → 4 rollout workers, of which 2 can work at a time: lower rollout.groups_per_assignment to have more of "
        "them work"
    )
    with pytest.raises(ConfigError, match=r"1 rollout workers are fewer than rollout\.min_workers=2"):
        fixed.request(1, "me")
    with pytest.raises(ConfigError, match=r"rollout\.workers is a number in this run"):
        fixed.request(None, "me")
    assert (asked, fixed.target, fixed.requests) == ([4], 4, 1)
    assert fixed.events() == [{"kind": "workers_scaled", "before": 2, "workers": 4, "reason": "me asked for 4"}]
    assert fixed.events() == []


def test_a_run_scales_itself_until_somebody_asks_for_a_number(tmp_path: Path) -> None:
    own, asked = scaling(tmp_path, workers={"min": 1, "max": 4})
    for step in range(STEPS):
        own.after_step(line(step, wait=1.6, idle=0.0), 1)
    assert asked == [], "the first step of a run is not measured"
    own.after_step(line(STEPS, wait=1.6, idle=0.0), 1)
    assert asked == [2]
    assert own.status()["mode"] == "auto"
    assert "the learner waited 80%" in own.status()["decisions"][-1]["reason"]
    for message, workers in (("fewer than rollout.workers.min=1", 0), ("more than rollout.workers.max=4", 5)):
        with pytest.raises(ConfigError, match=message):
            own.request(workers, "me")
    own.request(3, "me")
    for step in range(10):
        own.after_step(line(step, wait=0.0, idle=5.0), 3)
    assert (asked, own.status()["mode"]) == ([2, 3], "fixed")
    own.request(None, "me")
    for step in range(STEPS + 1):
        own.after_step(line(step, wait=0.0, idle=5.0), 3)
    assert asked[2:] == [2], "no more than halved"


# -- the status writer -------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Its pool is told of nothing but targets."""
    world = World(tmp_path / "world")
    yield world
    world.controller.close(10.0)


def ask(world: World, workers: int | None, *, for_s: float = 20.0) -> Any:
    name = put_request(world.run, ScaleRequest(workers=workers, by="me", expires=time.time() + for_s))
    answers: list[Any] = []
    until(lambda: answers.append(take_answer(world.run, name)) or answers[-1] is not None)
    until(lambda: world.run.list("control") == [])  # the answer comes first, then the request goes
    return answers[-1]


def test_a_run_takes_requests_from_its_folder_once_each(world: World) -> None:
    answer = ask(world, 2)
    assert (answer.accepted, answer.target, answer.number) == (True, 2, 1)
    assert world.pool.target == 2
    until(lambda: read_status(world.run)["scaling"]["requests"] == 1)
    world.pool.target = 99
    assert ask(world, 1).number == 2
    assert world.pool.target == 1
    refused = ask(world, None)
    assert not refused.accepted
    assert "a number in this run" in refused.message
    until(lambda: len(events(world, "workers_scaled")) == 2)


def events(world: World, kind: str) -> list[dict[str, Any]]:
    return [event for event in world.run.read_lines("events.jsonl") if event["kind"] == kind]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"workers": 2}',
        b'{"workers": 0, "expires": 9e9}',
        b'{"workers": -1, "expires": 9e9}',
        b'{"workers": 1.5, "expires": 9e9}',
        b'{"workers": "2", "expires": 9e9}',
        b'{"workers": true, "expires": 9e9}',
        b'{"workers": 999999999, "expires": 9e9}',
        b'{"workers": 2, "expires": 9e9, "command": "x"}',
        b'{"workers": 2, "expires": 1.0}',
        b'{"workers": 2, "expires": 9e9, "by": "' + b"x" * 5000 + b'"}',
        b"\xff\xfe\x00",
        b"[" * 4000,
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_malformed_request_is_refused_and_reported(tmp_path: Path, content: bytes) -> None:
    run, noted = RunDir.create(tmp_path, "run"), []  # type: ignore[var-annotated]
    status_writer = StatusWriter(run, dict, lambda workers, by: pytest.fail("it was applied"), noted.append)
    name = "control/scale-" + "0" * 32 + ".json"
    run.write_bytes(name, content)
    run.write_bytes("control/other.txt", b"not ours")
    status_writer.turn()
    answer = take_answer(run, name)
    assert answer is not None
    assert not answer.accepted
    assert answer.message
    assert [event["kind"] for event in noted] == ["scale_refused"]
    assert run.list("control") == ["other.txt"]
    assert read_status(run)["state"] == "running"


def test_a_status_that_cannot_be_written_ends_nothing(world: World) -> None:
    until(lambda: (world.run.local_path("status.json")).exists())
    world.run.delete("status.json")
    world.run.local_path("status.json").mkdir()
    world.controller.rewind(0)
    world.step(0)
    assert world.controller.failure() is None
    world.run.local_path("status.json").rmdir()
    until(lambda: world.run.local_path("status.json").is_file())


def test_a_status_tells_what_a_user_asks_for(world: World) -> None:
    world.controller.rewind(0)
    world.step(0, loss=1.0)
    world.plan(1)
    status = json.loads(json.dumps(world.controller.status()))
    assert status["waiting"] == "the learner works on step 1, and the workers wait for it"
    assert status["throughput"]["steps"] == 1
    first = world.lines()[0]
    assert status["throughput"]["samples_per_second"] == pytest.approx(first["samples_per_second"])
    assert status["throughput"]["groups_per_second"] == pytest.approx(first["samples_per_second"] / 2)
    assert status["throughput"]["seconds"]["wait_plan"] == pytest.approx(first["seconds/wait_plan"])
    assert (status["max_staleness"], status["metrics"]["staleness/max"]) == (0, 0)
    assert status["scaling"]["useful"] == 2
    assert status["buffer"] == {"arrived": 0, "held": 0, "capacity": 4}


def test_a_run_says_how_it_ended_and_keeps_its_figures(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    write_status(run, "running", 15.0, {"step": 7, "waiting": "x", "state": "facts do not count"})
    assert read_status(run)["state"] == "running"
    conclude_status(run, "failed: the disk is full: free some")
    status = read_status(run)
    assert (status["state"], status["error"], status["step"]) == ("failed", "the disk is full: free some", 7)
    run.delete("status.json")
    conclude_status(run, "interrupted")
    assert read_status(run)["state"] == "interrupted"
    run.write_json("status.json", {"format": 99})
    with pytest.raises(RunError, match="another version"):
        read_status(run)


def test_nodes_are_asked_for_again_before_it_is_forgotten_and_a_problem_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked, problem = [0.0], list[tuple[float, int]](), list[str]()

    def register(run: str, demands: Sequence[Demand]) -> None:
        if problem:
            raise RuntimeError(problem[0])
        asked.append((now[0], sum(demand.count for demand in demands)))

    monkeypatch.setattr("mmrl_ray.rollouts.pool_settings.register", register)
    wishes = Nodes("r", PoolSettings.of(config(tmp_path, rollout={"workers": 2})), lambda: now[0])

    def at(second: float, workers: int) -> list[str]:
        now[0] = second
        return [event["detail"] for event in wishes.ask_for(workers)]

    assert at(0, 2) == []  # a run that keeps its size asks for nothing
    assert [at(1, 3), at(2, 3), at(20, 3), at(21, 3), at(30, 2)] == [[]] * 5
    assert asked == [(1, 3), (21, 3), (30, 2)]
    problem.append("no coordinator")
    assert [at(50, 2), at(70, 2), at(71, 4)] == [["RuntimeError: no coordinator"], [], []]
    problem.clear()
    assert at(91, 4) == []
    assert asked[3:] == [(91, 4)]


QUORUM = PoolSettings(workers=3, min_workers=2, worker_deadline_s=10.0)


def test_too_few_for_too_long_is_an_error_that_names_the_last_loss() -> None:
    quorum = Quorum(QUORUM)
    for now, ready in ((0.0, 3), (5.0, 1), (15.0, 1), (15.5, 2), (16.0, 1), (26.0, 1)):
        quorum.look(ready, 3, now, "worker-1: died")
    with pytest.raises(RolloutError, match=r"1 of at least 2 .* for 10 s; last loss: worker-1: died; .*CPU: 1"):
        quorum.look(1, 3, 26.1, "worker-1: died")


def test_a_run_that_is_still_starting_has_no_minimum_yet() -> None:
    quorum = Quorum(QUORUM)
    for now in (0.0, 100.0, 200.0):
        quorum.look(1, 3, now, "")
    assert not quorum.complete
    quorum.look(2, 2, 201.0, "")  # resized in between
    assert quorum.complete
