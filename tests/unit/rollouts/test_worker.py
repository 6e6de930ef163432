"""The worker's plain half: what a run returns, and how the pool puts it together again. No Ray is started."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.errors import RolloutError
from mmrl_ray.experience.carriers import GroupKey, SamplingParams
from mmrl_ray.experience.schema import ROLLOUT_SCHEMA, decode_records
from mmrl_ray.rollouts.group_codec import Parcelled, open_payload
from mmrl_ray.rollouts.pool_settings import PoolSettings
from mmrl_ray.rollouts.pool_worker import PoolWorker, RolloutWorker, WorkerCall, join_result
from mmrl_ray.rollouts.types import Assignment, GroupRequest
from mmrl_ray.rollouts.weights import encode_state
from tests.unit.rollouts.fakes import FakeEngineFactory, config, samples


def assignment(count: int = 3) -> Assignment:
    groups = tuple(
        GroupRequest(GroupKey(1, i, 2), sample, SamplingParams(seed=10**17 + i), 2)
        for i, sample in enumerate(samples(count))
    )
    return Assignment(8, "train", groups, version=4)


def test_a_result_is_taken_apart_and_put_together() -> None:
    worker = RolloutWorker("w3", "my-run", FakeEngineFactory(broken=frozenset({"sample-001"})))
    worker.start()
    light, *parcels = worker.run(assignment())
    (records,) = light.records
    rows = decode_records(records)
    assert [len(parcel.groups) if parcel else None for parcel in parcels] == [2, None, None]
    assert len(pickle.dumps(light.result)) < 2000
    assert rows.schema.equals(ROLLOUT_SCHEMA)
    assert rows.select(["run", "index", "attempt", "worker"]).to_pylist() == [
        {"run": "my-run", "index": index, "attempt": 2, "worker": "w3"} for index in (0, 0, 2, 2)
    ]
    joined = join_result(light, ["ref-0", "ref-1", "ref-2"]).result
    assert [(group.sample_id, group.payload) for group in joined.groups] == [
        ("sample-000", Parcelled("ref-0", 0)),
        ("sample-002", Parcelled("ref-0", 1)),
    ]
    opened = [open_payload(group.payload, {"ref-0": parcels[0]}.get) for group in joined.groups]
    assert [group.sample.id for group in opened] == ["sample-000", "sample-002"]
    assert [failure.sample_id for failure in joined.failures] == ["sample-001"]


def test_nothing_but_broken_samples_has_no_rows() -> None:
    worker = RolloutWorker("w3", "my-run", FakeEngineFactory(broken=frozenset({"sample-000"})))
    worker.start()
    light, parcel = worker.run(assignment(1))
    assert (light.result.groups, parcel, light.records) == ((), None, ())


def test_a_worker_is_started_before_it_works() -> None:
    worker = RolloutWorker("w3", "my-run", FakeEngineFactory())
    assert worker.ping() == "pong"
    with pytest.raises(RolloutError, match="w3 was given assignment 8 before"):
        worker.run(assignment())


class FakeHandle:
    """An actor's handle whose methods return as many references as are asked for."""

    def __init__(self) -> None:
        self.ping = self.run = self
        self.returns = 1

    def options(self, num_returns: int) -> FakeHandle:
        self.returns = num_returns
        return self

    def remote(self, *args: Any) -> Any:
        return [f"ref-{i}" for i in range(self.returns)] if self.returns > 1 else "ref"


def test_the_pool_waits_for_the_light_value_of_a_run_and_keeps_the_references_to_its_parcels() -> None:
    worker = PoolWorker(0, "w0", FakeHandle(), "ready", since=0.0, first=True)
    worker.ask("ping")
    assert (worker.call, worker.probe_pending) == (WorkerCall("ping", "ref"), True)
    worker.give(assignment(3))
    assert worker.call == WorkerCall("run", "ref-0", ("ref-1", "ref-2", "ref-3"))
    assert (worker.version, worker.probe_pending) == (4, False)


def test_settings_follow_from_the_config(tmp_path: Path) -> None:
    cfg = config(
        tmp_path,
        rollout={"workers": 5, "min_workers": 2, "assignment_timeout_s": 7.0, "worker_deadline_s": 8.0},
        resources={"rollout": {"cpus": 0.5, "gpus": 0.25}, "placement_timeout_s": 9.0},
    )
    settings = PoolSettings.of(cfg)
    assert (settings.workers, settings.min_workers, settings.cpus, settings.gpus) == (5, 2, 0.5, 0.25)
    assert (settings.assignment_timeout_s, settings.worker_deadline_s, settings.placement_timeout_s) == (7.0, 8.0, 9.0)
    assert settings.demand == "{CPU: 0.5, GPU: 0.25}"
    assert PoolSettings(workers=1).demand == "{CPU: 1}"


def test_encoded_weights_are_what_the_engine_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    store = {"the reference": encode_state({"version": torch.tensor(4)})}
    monkeypatch.setattr("mmrl_ray.rollouts.pool.ray.get", lambda reference, timeout: store[reference])
    worker = RolloutWorker("w3", "my-run", FakeEngineFactory())
    worker.start()
    worker.run(replace(assignment(), weights=("the reference",)))
    assert worker._engine.seen == [(4, 4)]  # type: ignore[union-attr]
