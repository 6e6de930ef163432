"""What a controller, a rollout worker and a learner tell a meter, and what the controller logs about it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.experience.carriers import StepPlan
from mmrl_ray.learner.train_loop import export_checkpoint_metrics, export_learner_metrics
from mmrl_ray.rollouts.controller import Controller
from mmrl_ray.rollouts.pool_worker import RolloutWorker
from mmrl_ray.rollouts.types import AssignmentResult
from mmrl_ray.rollouts.weights import decode_state, encode_state
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.telemetry.logs import CONTEXT
from tests.support.meters import MemoryMeter
from tests.unit.rollouts.fakes import FakeEngine, FakePool, ListSource, config, samples


class World:
    """A controller with a meter, on a pool in this process."""

    def __init__(self, folder: Path, engine: FakeEngine) -> None:
        self.cfg = config(folder)
        self.run = RunDir.create(folder, "run")
        self.meter = MemoryMeter(run=self.cfg.run.name)
        self.pool = FakePool(engine, decode_state)
        self.controller = Controller(
            self.cfg,
            self.run,
            pool=self.pool,
            source=ListSource(samples(40)),
            put=lambda value: value,
            fetch=lambda value: value,
            meter=self.meter,
        )
        self.controller.start()
        self.controller.rewind(0)

    def step(self, step: int, **metrics: Any) -> StepPlan:
        plan = self.controller.next_plan(step, 1, wait_s=20.0)
        assert isinstance(plan, StepPlan), plan
        self.controller.publish(step + 1, encode_state({"version": torch.tensor(step + 1)}))
        self.controller.finish_step(step, metrics)
        return plan

    def look(self) -> None:
        for sample in self.meter.watched:
            sample()

    def events(self, kind: str) -> list[dict[str, Any]]:
        self.controller._pump.call(lambda: None, 20.0)  # a turn has ended
        self.controller._pump.call(lambda: None, 20.0)
        return [event for event in self.run.read_lines("events.jsonl") if event["kind"] == kind]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def build(**engine: Any) -> World:
        worlds.append(World(tmp_path, FakeEngine("w0", **engine)))
        return worlds[-1]

    yield build
    for world in worlds:
        world.controller.close(10.0)
    CONTEXT.clear()


def test_steps_are_measured_as_they_are_written_down(
    make: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    world = make(masked=frozenset({"sample-001"}), broken=frozenset({"sample-006"}))
    caplog.set_level(logging.INFO, "mmrl_ray.rollouts.run_metrics")
    for step in range(3):
        world.step(step, loss=0.5 * step, **{"seconds/fetch": 0.25})
    (failed,) = world.events("reward_failed")
    assert (failed["step"], failed["groups"], failed["captions"], failed["detail"]) == (0, 1, 2, "no references")
    (broken,) = world.events("sample_quarantined")
    assert (broken["sample"], broken["detail"]) == ("sample-006", "ImageError: broken")
    world.look()
    lines, values = world.run.read_lines("metrics.jsonl"), world.meter.values
    run = "test-run"
    assert values["finished_steps", run] == 3
    assert values["planned_steps", run] == 6
    assert values["policy_version", run] == 3
    assert values["loss", run] == 1.0
    assert values["reward_mean", run] == lines[2]["reward/mean"]
    assert values["reward_part", run, "sum"] == lines[2]["reward/sum"]
    assert values["phase_seconds", run, "fetch"] == 0.75
    assert values["masked_groups", run] == sum(line["masked"] for line in lines) == 1
    assert values["masked_captions", run] == sum(line["masked_captions"] for line in lines) == 2
    assert values["quarantined_samples", run] == sum(line["quarantined"] for line in lines) == 1
    assert (values["groups", run], values["completions", run]) == (11, 20)
    assert values["learned_tokens", run, "prompt"] == 10 * 5
    assert {values["workers", run, state] for state in ("placing", "starting", "busy", "retiring")} == {0}
    assert (values["workers", run, "ready"], values["workers_target", run]) == (1, 1)
    # Step 3 is sampled already, and nobody has asked for it.
    assert (values["queued_assignments", run], values["buffered_groups", run, "arrived"]) == (0, 4)
    assert values["assignments", run, "accepted"] == len(world.pool.submitted)
    assert [round(s, 9) for s in world.meter.observed["step_seconds", run]] == [
        round(line["seconds/step"], 9) for line in lines
    ]
    assert values["events", run, "reward_failed"] == values["events", run, "sample_quarantined"] == 1
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert any(level == "INFO" and text.startswith("step 3 of 6: reward ") for level, text in said)
    assert ("WARNING", "reward failed: step 0, groups 1, captions 2, detail no references") in said


def test_learners_that_start_again_leave_an_event(make: Callable[..., World]) -> None:
    world = make()
    world.step(0)
    state = world.controller.checkpoint_state(1)
    world.step(1)
    world.controller.restore(state)
    world.controller.publish(1, encode_state({"version": torch.tensor(1)}))
    world.step(1)
    (event,) = world.events("learner_restarted")
    assert (event["at_step"], event["step"]) == (2, 1)
    assert world.meter.values["finished_steps", "test-run"] == 2
    # Right behind a checkpoint there is nothing to do again, and it happened all the same.
    world.controller.restore(world.controller.checkpoint_state(2))
    _, event = world.events("learner_restarted")
    assert (event["at_step"], event["step"]) == (2, 2)
    world.step(2)


def test_a_worker_measures_each_assignment(make: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    world.step(0)
    assignment = replace(world.pool.submitted[0], weights=())
    meter = MemoryMeter(run="r", worker="w-9")
    worker = RolloutWorker("w-9", "r", lambda name: FakeEngine(name, masked=frozenset({"sample-000"})))
    worker._meter = meter
    monkeypatch.setattr("mmrl_ray.rollouts.pool_worker.start_logging", lambda *_, **__: None)
    assert worker.start().pid == os.getpid()
    worker.run(assignment)
    tokens = meter.values.pop(("worker_tokens", "r", "w-9", "completion"))
    assert tokens == 2 * (2 + 3)
    assert meter.values == {
        ("worker_policy_version", "r", "w-9"): 0.0,
        ("worker_groups", "r", "w-9"): 2.0,
        ("worker_tokens", "r", "w-9", "prompt"): 10.0,
        ("worker_reward_failures", "r", "w-9"): 2.0,
    }
    assert meter.observed == {("assignment_seconds", "r"): [0.0]}


def test_a_learner_measures_its_own_part(make: Callable[..., World]) -> None:
    plan = make().step(0)
    meter = MemoryMeter(run="r", rank="0")
    export_learner_metrics(meter, plan, 0, {"seconds/fetch": 0.5, "loss": 1.0})
    export_checkpoint_metrics(meter, 2.5)
    mine = [plan.groups[index] for batch in plan.micro_batches[0] for index in batch]
    assert len(mine) == 4
    assert meter.values == {
        ("learner_seconds", "r", "0", "fetch"): 0.5,
        ("learner_steps", "r", "0"): 1.0,
        ("learner_tokens", "r", "0", "prompt"): 20.0,
        ("learner_tokens", "r", "0", "completion"): float(sum(sum(group.completion_tokens) for group in mine)),
        ("checkpoints", "r"): 1.0,
    }
    assert meter.observed == {("checkpoint_seconds", "r"): [2.5]}


def test_what_an_engine_found_in_its_caches_is_in_a_steps_line_and_measured(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = FakeEngine.run

    def counted(engine: FakeEngine, *args: Any) -> AssignmentResult:
        result = sampled(engine, *args)
        found = {"prefix_cache_queries": 80.0, "prefix_cache_hits": 60.0, "mm_cache_queries": 2.0, "mm_cache_hits": 2.0}
        first, *others = result.groups
        return replace(result, groups=(replace(first, counters={**first.counters, **found}), *others))

    monkeypatch.setattr(FakeEngine, "run", counted)
    world = make()
    world.step(0)
    (line,) = world.run.read_lines("metrics.jsonl")
    assert line["engine/prefix_cache_hit_fraction"] == 0.75
    worker, meter = RolloutWorker("w-9", "r", FakeEngine), MemoryMeter(run="r", worker="w-9")
    worker._meter = meter
    monkeypatch.setattr("mmrl_ray.rollouts.pool_worker.start_logging", lambda *_, **__: None)
    worker.start()
    worker.run(replace(world.pool.submitted[0], weights=()))
    looked = {key[3:]: value for key, value in meter.values.items() if key[0] == "worker_engine_lookups"}
    assert looked == {("tokens", "hit"): 60.0, ("tokens", "miss"): 20.0, ("pictures", "hit"): 2.0}
