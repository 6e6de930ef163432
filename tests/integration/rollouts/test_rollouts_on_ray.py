"""The controller with real workers: what a run loses when they die, hang, come and go (nothing), and when it ends.

The judge is the rollout log, read by duckdb, against what seeds and stream say about every group.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pytest
import ray
import torch
from ray._raylet import AuthenticationMode, get_authentication_mode
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

from mmrl_ray.data.samples import SampleStream, write_parquet
from mmrl_ray.errors import DataError, ModelError, PlacementError, RolloutError, RunError
from mmrl_ray.experience.carriers import SamplingParams, StepPlan, group_seed
from mmrl_ray.jobs.control import RunControl
from mmrl_ray.rollouts.controller import Controller
from mmrl_ray.rollouts.controller_actor import start_controller
from mmrl_ray.rollouts.pool import RayWorkerPool
from mmrl_ray.rollouts.pool_settings import PoolSettings
from mmrl_ray.rollouts.types import Stop
from mmrl_ray.rollouts.weights import encode_state
from mmrl_ray.run_records.run_dir import RunDir
from tests.support.prometheus import exported
from tests.unit.rollouts.fakes import FakeEngineFactory, config, samples

pytestmark = pytest.mark.usefixtures("local_ray")

WAIT_S = 120.0


def until(condition: Callable[[], object], what: str, seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class World:
    """A controller in this process with workers on Ray, and a learner that takes its steps."""

    def __init__(self, folder: Path, factory: FakeEngineFactory, settings: dict[str, Any], sections: Any) -> None:
        self.cfg = config(folder, **sections)
        write_parquet(folder / "train", samples(40), rows_per_group=10)
        self.run = RunDir.create(folder, "run")
        limits = {
            "workers": self.cfg.rollout.first_workers,
            "probe_every_s": 0.2,
            "assignment_timeout_s": 30.0,
            **settings,
        }
        self.pool = RayWorkerPool("test-run", factory, PoolSettings(**limits))
        self.controller = Controller(
            self.cfg,
            self.run,
            pool=self.pool,
            source=stream(self.cfg),
            put=ray.put,
            fetch=lambda value: ray.get(value, timeout=20) if isinstance(value, ray.ObjectRef) else value,
        )
        self.controller.start()

    def plan(self, step: int) -> StepPlan:
        answer = self.controller.next_plan(step, 1, wait_s=WAIT_S)
        assert isinstance(answer, StepPlan), answer
        return answer

    def step(self, step: int) -> StepPlan:
        plan = self.plan(step)
        self.controller.publish(step + 1, encode_state({"version": torch.tensor(step + 1)}))
        self.controller.finish_step(step, {})
        return plan

    def workers(self, state: str) -> dict[str, int]:
        """Pids by name of the workers in a state."""
        workers = self.controller.status()["pool"]["workers"]
        return {name: each["pid"] for name, each in workers.items() if each["state"] == state}

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.run.read_lines("events.jsonl") if event["kind"] == kind]

    def signal_one(self, state: str, number: signal.Signals) -> tuple[str, int]:
        """Sends a signal to a worker that is in a state."""
        until(lambda: self.workers(state), f"no worker was {state}")
        name, pid = next(iter(self.workers(state).items()))
        os.kill(pid, number)
        return name, pid

    def check_log(self, steps: int, missing: set[tuple[int, int]] = frozenset()) -> list[tuple[Any, ...]]:  # type: ignore[assignment]
        """Every group of every step is there once, with the tokens that its seed stands for; returns the rows."""
        self.controller.checkpoint_state(steps)
        files = str(self.run.local_path("rollouts/*.parquet"))
        rows = duckdb.sql(
            f"select step, \"index\", completion, sample_id, token_ids, attempt from '{files}' order by all"
        ).fetchall()
        source = stream(self.cfg)
        expected = []
        for step in range(steps):
            for index, sample in enumerate(source.take(4)):
                digits = [int(d) for d in str(group_seed(3, step, index))]
                if (step, index) not in missing:
                    expected.append((step, index, 0, sample.id, digits[:2]))
                    expected.append((step, index, 1, sample.id, digits[2:5]))
        assert [row[:5] for row in rows] == expected
        return rows


def stream(cfg: Any) -> SampleStream:
    return SampleStream(cfg.data.train, prompt="Describe.", seed=3, max_quarantined=2)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def build(factory: FakeEngineFactory, *, settings: dict[str, Any] | None = None, **sections: Any) -> World:
        worlds.append(World(tmp_path, factory, settings or {}, sections))
        return worlds[-1]

    yield build
    for world in worlds:
        world.controller.close(10.0)


def test_a_run_through_the_actor(tmp_path: Path) -> None:
    """Staleness 2, through the client that learner and driver use; payloads outlive the workers that made them."""
    assert get_authentication_mode() == AuthenticationMode.TOKEN
    cfg = config(tmp_path, rollout={"max_staleness": 2, "workers": 1}, learner={"steps": 4})
    write_parquet(tmp_path / "train", samples(40))
    run = RunDir.create(tmp_path, "run")
    client = start_controller(cfg, run, FakeEngineFactory())
    client.rewind(0)
    seen = []
    for step in range(4):
        plan = client.next_plan(step, world_size=2)
        assert isinstance(plan, StepPlan)
        seen.append({group.staleness for group in plan.groups})
        if step == 0:
            until(lambda: client.status()["buffer"]["arrived"] == 8, "generation did not run ahead")
            (worker,) = client.status()["pool"]["workers"].values()
            os.kill(worker["pid"], signal.SIGKILL)
        groups = client.groups([group.payload for group in plan.groups])
        assert [group.sample.id for group in groups] == [group.sample_id for group in plan.groups]
        client.publish(step + 1, {"version": torch.tensor(step + 1)})
        client.finish_step(step, {"loss": 1.0})
    assert seen == [{0}, {1}, {2}, {2}]
    assert client.next_plan(4, 2) == Stop("all 4 steps are done")
    assert client.fetch(4) == {"version": torch.tensor(4)}
    generated = client.generate(samples(3), SamplingParams(greedy=True, max_new_tokens=4), idle_s=WAIT_S)
    assert generated.version == 4
    captions = client.groups([group.payload for group in generated.groups if group is not None])
    assert [group.sample.id for group in captions] == ["sample-000", "sample-001", "sample-002"]
    with pytest.raises(RolloutError, match="its plan is not out"):
        client.finish_step(9, {})
    client.close()
    counts = duckdb.sql(f"select step, count(*) from '{tmp_path}/run/rollouts/*.parquet' group by 1 order by 1")
    assert counts.fetchall() == [(step, 8) for step in range(4)]
    with pytest.raises(RolloutError, match="controller is gone"):
        client.status()


def test_data_that_cannot_be_read_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        start_controller(config(tmp_path), RunDir.create(tmp_path, "run"), FakeEngineFactory())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_dynamic_sampling_makes_the_same_steps_with_any_number_of_workers(
    make: Callable[..., World], workers: int
) -> None:
    """Against the stream itself: the first four samples whose captions differ in their reward."""
    flat = frozenset(f"sample-{i:03d}" for i in range(40) if i % 3)
    world = make(
        FakeEngineFactory(seconds=0.05, flat=flat), learner={"dynamic_sampling": True}, rollout={"workers": workers}
    )
    world.controller.rewind(0)
    source = stream(world.cfg)
    for step in range(3):
        plan = world.step(step)
        line = world.run.read_lines("metrics.jsonl")[-1]
        drawn = source.take(int(line["sampled/groups"]))
        kept = [(index, sample.id) for index, sample in enumerate(drawn) if sample.id not in flat]
        assert [(g.key.index, g.sample_id) for g in plan.groups] == kept[:4]
        # What is drawn follows from what was found: 4, then as many as were missing ÷ the share so far.
        expected, more = 0, 4
        while more:
            expected += more
            found = sum(index < expected for index, _ in kept)
            more = min(-(-(4 - found) * expected // max(found, 1)), 4, 16 - expected) if found < 4 else 0
        assert len(drawn) == expected


def test_killed_workers_cost_nothing_and_a_new_one_takes_their_place(make: Callable[..., World]) -> None:
    """Strictly on-policy: one worker dies at its work, one while it has none."""
    world = make(FakeEngineFactory(seconds=0.3))
    world.controller.rewind(0)
    world.step(0)
    world.signal_one("busy", signal.SIGKILL)
    plan = world.step(1)
    assert {group.staleness for group in plan.groups} == {0}
    world.plan(2)  # nothing is dispatched until it is learned from: workers are idle
    until(lambda: len(world.workers("ready")) == 2, "the killed worker was not replaced")
    idle, _ = world.signal_one("ready", signal.SIGKILL)
    until(lambda: len(world.events("worker_lost")) == 2, "the death of an idle worker went unnoticed")
    world.step(2)
    world.step(3)
    rows = world.check_log(4)
    assert {(row[0], row[5]) for row in rows} == {(0, 0), (1, 0), (1, 1), (2, 0), (3, 0)}
    assert world.events("worker_lost")[1]["worker"] == idle
    counts = world.controller.status()["pool"]["assignments"]
    assert counts.keys() == {"accepted", "retried"}
    assert counts["retried"] == 1
    assert 8 <= counts["accepted"] <= 10, "two each of steps 0 to 3, and what has come of step 4 by now"


def test_workers_come_and_go_while_the_run_goes_on(make: Callable[..., World]) -> None:
    """As `mmrl scale` has it: through the run's folder, answered by the run, over when it is so."""
    rollout = {"workers": 1, "groups_per_assignment": 1}
    world = make(FakeEngineFactory(seconds=0.3), rollout=rollout)
    control = RunControl(world.run)
    until(lambda: world.run.exists("status.json"), "the run said nothing")
    world.controller.rewind(0)
    answer = control.request(3, by="a test", timeout_s=WAIT_S)
    assert answer.message == "1 → 3 rollout workers"
    assert control.wait_in_effect(answer, timeout_s=WAIT_S) == "3 rollout workers are ready"
    learners = {"requester_id": "ray-train-1", "resources": [{"CPU": 2.0}], "expire_after_s": 60.0}
    ray.get(get_or_create_autoscaling_coordinator().request_resources.remote(**learners), timeout=20)
    until(lambda: autoscaler_wish() == [{"CPU": 1.0}] * 3 + [{"CPU": 2.0}], "three workers beside Ray Train's learner")
    world.step(0)
    until(lambda: len(world.workers("busy")) == 3, "three workers did not work at once")
    busy = world.controller.status()["pool"]["workers"].values()
    assert {(worker["version"], worker["at"][:5], worker["at"][-6:]) for worker in busy} == {(1, "group", "step 1")}
    answer = control.request(1, by="a test", timeout_s=WAIT_S)
    world.step(1)
    control.wait_in_effect(answer, timeout_s=WAIT_S)
    assert len(world.controller.status()["pool"]["workers"]) == 1
    world.step(2)
    too_many = control.request(4, by="a test", timeout_s=WAIT_S)
    until(lambda: world.controller.status()["pool"]["ready"] == 3, "there was no room for three")
    with pytest.raises(RunError, match=r"3 of 4 .* are ready; being placed .*it asks for \{CPU: 1\}, and nothing is"):
        control.wait_in_effect(too_many, timeout_s=4)
    rows = world.check_log(3)
    # Those that went finished what they had: nothing was tried twice.
    assert {row[5] for row in rows} == {0}
    assert world.events("worker_lost") == []
    assert len(world.events("worker_retiring")) == 2
    assert [(e["before"], e["workers"]) for e in world.events("workers_scaled")] == [(1, 3), (3, 1), (1, 4)]


def autoscaler_wish() -> list[dict[str, float]]:
    """What Ray's autoscaler would read."""
    state = ray._private.worker.global_worker.gcs_client.internal_kv_get(b"autoscaler_resource_request", None)
    return json.loads(state or b"[]")


def test_a_run_scales_itself_by_what_it_measures(make: Callable[..., World]) -> None:
    """Sampling of 4 × 0.2 worker-seconds a step, and a learner that takes no time: more workers, up to the most."""
    world = make(FakeEngineFactory(seconds=0.2), rollout={"workers": {"min": 1, "max": 2}, "groups_per_assignment": 1})
    world.controller.rewind(0)
    step = 0
    while world.controller.status()["scaling"]["target"] < 2:
        assert step < 6, world.controller.status()["scaling"]
        world.step(step)
        step += 1
    until(lambda: world.controller.status()["pool"]["ready"] == 2, "no second worker came")
    (event,) = world.events("workers_scaled")
    assert "the learner waited" in event["reason"]
    assert step == 4, "one to begin with, three to measure"
    world.check_log(step)


def test_a_worker_that_hangs_is_replaced(make: Callable[..., World]) -> None:
    """Stopped processes stay connected: only deadlines find them, at work and idle."""
    # Long enough for workers that do not hang, on a machine that is busy.
    settings = {"assignment_timeout_s": 6.0, "probe_timeout_s": 4.0}
    # At work long enough that a worker seen busy still is when the signal reaches it, on a machine that is busy too.
    world = make(FakeEngineFactory(seconds=0.8), settings=settings)
    world.controller.rewind(0)
    world.step(0)
    _, busy = world.signal_one("busy", signal.SIGSTOP)
    world.step(1)
    world.plan(2)
    until(lambda: len(world.workers("ready")) == 2, "the hung worker was not replaced")
    name, idle = world.signal_one("ready", signal.SIGSTOP)
    (stopped,) = (worker for worker in world.pool._workers.values() if worker.name == name)
    until(lambda: stopped.probe_pending and time.monotonic() - stopped.probed > 1.0, "the idle worker was not asked")
    # While nobody knows yet: what is to be done now goes to the other one.
    world.step(2)
    world.step(3)
    until(lambda: len(world.events("worker_lost")) == 2, "the idle worker that hangs went unnoticed")
    rows = world.check_log(4)
    assert {(row[0], row[5]) for row in rows} == {(0, 0), (1, 0), (1, 1), (2, 0), (3, 0)}
    lost = [(event["detail"], len(event["samples"])) for event in world.events("worker_lost")]
    assert lost == [("no result within 6 s", 2), ("idle, and no answer within 4 s", 0)]
    until(lambda: not any(alive(pid) for pid in (busy, idle)), "a stopped process was left behind")


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_sample_that_kills_workers_is_quarantined(make: Callable[..., World]) -> None:
    world = make(FakeEngineFactory(crash_on=frozenset({"sample-007"})), settings={"workers": 1})
    victim = next(
        (step, index)
        for step in range(10)
        for index, sample in enumerate(_step_samples(world.cfg, step))
        if sample.id == "sample-007"
    )
    world.controller.rewind(0)
    for step in range(victim[0] + 1):
        world.step(step)
    world.check_log(victim[0] + 1, missing={victim})
    assert world.controller.status()["quarantined"] == 1
    counts = world.controller.status()["pool"]["assignments"]
    assert (counts["retried"], counts["split"], counts["quarantined"]) == (1, 1, 1)
    assert [event["kind"] for event in world.events("worker_lost")] == ["worker_lost"] * 3
    assert all("sample-007" in event["samples"] for event in world.events("worker_lost"))


def _step_samples(cfg: Any, step: int) -> list[Any]:
    source = stream(cfg)
    source.take(4 * step)
    return source.take(4)


def test_too_few_workers_for_too_long_end_the_run(make: Callable[..., World], tmp_path: Path) -> None:
    flag = tmp_path / "stuck"
    settings = {"min_workers": 2, "worker_deadline_s": 1.0}
    world = make(FakeEngineFactory(stuck_while=str(flag)), settings=settings)
    until(lambda: len(world.workers("ready")) == 2, "two workers did not start")
    flag.touch()
    name, _ = world.signal_one("ready", signal.SIGKILL)
    until(lambda: world.controller.failure() is not None, "the run did not end")
    assert isinstance(world.controller.failure(), RolloutError)
    message = str(world.controller.failure())
    assert message.startswith(f"1 of at least 2 rollout workers were ready for 1 s; last loss: {name}: ActorDiedError")
    assert "a new one asks for {CPU: 1}" in message
    flag.unlink()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"cpus": 64.0, "gpus": 2.0}, "{CPU: 64, GPU: 2}"),
        ({"node_labels": {"pool": "other"}}, "{CPU: 1} on a node labelled pool=other"),
    ],
)
def test_a_worker_that_cannot_be_placed_ends_the_run(
    make: Callable[..., World], asked: dict[str, Any], words: str
) -> None:
    world = make(FakeEngineFactory(), settings={**asked, "placement_timeout_s": 1.0})
    world.controller.rewind(0)
    answer = world.controller.next_plan(0, 1, wait_s=WAIT_S)
    assert isinstance(answer, Stop)
    assert answer.failed
    assert isinstance(world.controller.failure(), PlacementError)
    assert f"asks for {words}, the cluster has {{'CPU': 3.0}} in all" in answer.reason


@pytest.mark.parametrize("when", ["start", "work"])
def test_a_worker_that_lost_the_process_of_its_engine_is_replaced(
    make: Callable[..., World], tmp_path: Path, when: str
) -> None:
    flag = str(tmp_path / "lost")
    factory = FakeEngineFactory(lose_first=flag) if when == "start" else FakeEngineFactory(lose_once=flag)
    world = make(factory, settings={"workers": 1})
    world.controller.rewind(0)
    answer = world.controller.next_plan(0, 1, wait_s=WAIT_S)
    assert not isinstance(answer, Stop)
    assert len(world.events("worker_created")) == 2
    (lost,) = world.events("worker_lost")
    assert "ProcessError: the process of an engine" in lost["detail"]


def test_others_go_on_while_the_place_of_a_worker_cannot_be_taken(make: Callable[..., World], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    world = make(FakeEngineFactory(refused_while=str(gone)))
    until(lambda: len(world.workers("ready")) == 2, "two workers did not start")
    gone.touch()
    world.signal_one("ready", signal.SIGKILL)
    refused = "ConfigError: rollout.engine.python='/nowhere/python' is no program"
    until(lambda: sum(refused in e["detail"] for e in world.events("worker_lost")) >= 2, "no two tries to replace it")
    world.controller.rewind(0)
    world.step(0)
    gone.unlink()
    until(lambda: len(world.workers("ready")) == 2, "nobody took its place")
    world.step(1)
    world.check_log(2)


@pytest.mark.parametrize("when", ["start", "work"])
def test_an_error_that_every_worker_would_make_ends_the_run_at_once(make: Callable[..., World], when: str) -> None:
    everyone = frozenset(sample.id for sample in samples(40))
    at_start, at_work = FakeEngineFactory(start_error="no vision tower"), FakeEngineFactory(raise_on=everyone)
    world = make(at_start if when == "start" else at_work, settings={"workers": 1})
    world.controller.rewind(0)
    answer = world.controller.next_plan(0, 1, wait_s=WAIT_S)
    assert isinstance(answer, Stop)
    failure = world.controller.failure()
    assert type(failure) is ModelError
    assert ("no vision tower" if when == "start" else "are NaN") in str(failure)
    assert len(world.events("worker_created")) == 1


def test_metrics_reach_prometheus_and_logs_are_json(tmp_path: Path) -> None:
    """What a run through the actor exports at its node's metrics port, against what it wrote down; and its logs."""
    cfg = config(
        tmp_path,
        run={"name": "watched", "log_format": "json"},
        rollout={"workers": 1},
        learner={"steps": 3},
    )
    write_parquet(tmp_path / "train", samples(40))
    run = RunDir.create(tmp_path, "run")
    without_reward = _step_samples(cfg, 0)[0].id
    client = start_controller(cfg, run, FakeEngineFactory(seconds=0.05, masked=frozenset({without_reward})))
    client.rewind(0)
    for step in range(3):
        plan = client.next_plan(step, world_size=1)
        assert isinstance(plan, StepPlan)
        client.publish(step + 1, {"version": torch.tensor(step + 1)})
        client.finish_step(step, {"loss": 0.5 + step, "seconds/fetch": 0.25})
    lines = run.read_lines("metrics.jsonl")
    try:
        expected = {
            ("ray_mmrl_finished_steps", ""): 3.0,
            ("ray_mmrl_loss", ""): 2.5,
            ("ray_mmrl_reward_mean", ""): lines[2]["reward/mean"],
            ("ray_mmrl_reward_part", "sum"): lines[2]["reward/sum"],
            ("ray_mmrl_groups_total", ""): 12.0,
            ("ray_mmrl_masked_groups_total", ""): float(sum(line["masked"] for line in lines)),
            ("ray_mmrl_phase_seconds_total", "fetch"): 0.75,
            ("ray_mmrl_phase_seconds_total", "sample"): sum(line["seconds/sample"] for line in lines),
            ("ray_mmrl_step_seconds_count", ""): 3.0,
            ("ray_mmrl_worker_groups_total", "worker-0"): 12.0,
            ("ray_mmrl_worker_reward_failures_total", "worker-0"): 2.0,
            ("ray_mmrl_assignment_seconds_count", ""): 6.0,
            # Only a look at the controller every few seconds tells of these:
            ("ray_mmrl_workers", "ready"): 1.0,
            ("ray_mmrl_assignments_total", "accepted"): 6.0,
        }
        found: dict[tuple[str, str], float] = {}

        def all_there() -> bool:
            found.update(scraped("watched"))
            return all(found.get(key) == pytest.approx(value) for key, value in expected.items())

        until(all_there, "the metrics did not reach the agent", 40.0)
    finally:
        print("expected, found:", {key: (value, found.get(key)) for key, value in expected.items()})
        client.close()
    said = json_lines("watched")
    assert {line["role"] for line in said} == {"controller", "worker-0"}
    steps = [line for line in said if line["message"].startswith("step 3 of 3: reward ")]
    assert [(line["role"], line["logger"]) for line in steps] == [("controller", "mmrl_ray.rollouts.run_metrics")]
    (failed,) = [line for line in said if line["message"].startswith("reward failed: step 0")]
    assert (failed["level"], failed["run"]) == ("warning", "watched")
    assert all(line["worker"] == "worker-0" for line in said if line["role"] == "worker-0")


def scraped(run: str) -> dict[tuple[str, str], float]:
    """Samples of a run at the node's metrics port, by series and the value of the label that is its own."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    found: dict[tuple[str, str], float] = {}
    for metric, sample in exported(node["MetricsExportPort"]):
        if sample.labels.get("run") == run and not sample.name.endswith("_bucket"):
            first = next((sample.labels[name] for name in metric.labels if name != "run"), "")
            found[sample.name, first] = sample.value
    return found


def json_lines(run: str) -> list[dict[str, Any]]:
    """Log lines of a run in Ray's own log files."""
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    found = []
    for path in logs.glob("worker-*.err"):
        for line in path.read_text().splitlines():
            if line.startswith('{"time"') and (parsed := json.loads(line))["run"] == run:
                found.append(parsed)
    return found


def test_workers_are_told_of_what_they_are_given_next(make: Callable[..., World]) -> None:
    """While they work and while they have nothing to do; the groups are those of every other run."""
    # No pings: a worker that has yet to answer one is passed over.
    settings = {"prepares_ahead": True, "probe_every_s": 1000.0}
    world = make(FakeEngineFactory(seconds=0.2), settings=settings, learner={"steps": 4})
    world.controller.rewind(0)
    world.controller.publish(0, encode_state({"version": torch.tensor(0)}))
    for step in range(4):
        if step == 1:
            world.signal_one("busy", signal.SIGKILL)
        world.plan(step)
        until(lambda: len(world.workers("ready")) == 2, "no second worker")
        if step < 3:  # there is no step after it to be told of
            until(lambda: all(map(world.pool.tracker.is_told, list(world.pool._workers))), "a worker was told nothing")
        until(lambda: all(w.call is None for w in list(world.pool._workers.values())), "a worker did not hear")
        world.controller.publish(step + 1, encode_state({"version": torch.tensor(step + 1)}))
        world.controller.finish_step(step, {})
    world.check_log(4)
    ahead = [line["prompts/ahead"] for line in world.run.read_lines("metrics.jsonl")]
    assert ahead[2:] == [4, 4]
