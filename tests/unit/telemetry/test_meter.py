"""Meters: what they take and refuse, and that the one on Ray never stops whoever measures."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from mmrl_ray.rollouts.run_metrics import export_step_metrics
from mmrl_ray.telemetry import ray_meter, table
from mmrl_ray.telemetry.meter import Meter, PrometheusMeter, Totals
from mmrl_ray.telemetry.ray_meter import RayMeter
from tests.support.meters import MemoryMeter


@pytest.mark.parametrize("kind", [Meter, MemoryMeter])
def test_labels_and_kinds_are_held_to_the_table(kind: type[Meter]) -> None:
    meter = kind(run="r", worker="w")
    with pytest.raises(ValueError, match=r"mmrl_worker_seconds has the labels .*was given \('run', 'worker'\)"):
        meter.add(table.WORKER_SECONDS, 1.0)
    with pytest.raises(ValueError, match="mmrl_loss has the labels"):
        meter.set(table.LOSS, 1.0, term="kl")
    with pytest.raises(ValueError, match="mmrl_loss is a gauge, and was measured as a counter"):
        meter.add(table.LOSS, 1.0)
    meter.add(table.WORKER_SECONDS, 1.0, phase="sample")


def test_the_process_gives_the_labels_that_a_metric_has() -> None:
    meter = MemoryMeter(run="r", worker="w-1")
    meter.add(table.WORKER_SECONDS, 1.5, phase="sample")
    meter.add(table.WORKER_SECONDS, 0.5, phase="sample")
    meter.set(table.LOSS, 2.0)
    meter.set(table.LOSS, float("nan"))
    meter.add(table.GROUPS, 0)
    assert meter.values == {("worker_seconds", "r", "w-1", "sample"): 2.0, ("loss", "r"): 2.0}


def test_totals_add_what_has_come_since() -> None:
    meter = MemoryMeter(run="r")
    totals = Totals(meter)
    for total in (3, 3, 5, 2):  # the last one began anew
        totals.reach(table.ASSIGNMENTS, total, outcome="accepted")
    totals.reach(table.ASSIGNMENTS, 1, outcome="retried")
    assert meter.values == {("assignments", "r", "accepted"): 7.0, ("assignments", "r", "retried"): 1.0}


def test_every_number_of_a_steps_line_goes_somewhere() -> None:
    line = {"step": 3, "policy_version": 4, "reward/mean": 0.5, "reward/std": 0.1, "reward/group_std": 0.2}
    line |= {"reward/caption": 0.4, "reward/caption/bleu": 0.3, "loss": -1.0, "loss/policy": -1.1, "kl": float("nan")}
    line |= {"seconds/step": 2.0, "seconds/sample": 1.5, "masked": 1, "dropped": 0, "shared_prefix": True}
    meter = MemoryMeter(run="r")
    export_step_metrics(meter, {**line, "clip_fraction": 0.25, "note": "words are no figure"})
    assert meter.values == {
        ("policy_version", "r"): 4.0,
        ("reward_mean", "r"): 0.5,
        ("reward_std", "r"): 0.1,
        ("figure", "r", "reward/group_std"): 0.2,
        ("reward_part", "r", "caption"): 0.4,
        ("reward_part", "r", "caption/bleu"): 0.3,
        ("loss", "r"): -1.0,
        ("loss_term", "r", "policy"): -1.1,
        ("phase_seconds", "r", "sample"): 1.5,
        ("masked_groups", "r"): 1.0,
        ("shared_prefix", "r"): 1.0,
        ("figure", "r", "clip_fraction"): 0.25,
    }
    assert meter.observed == {("step_seconds", "r"): [2.0]}


def test_prometheus_text_has_the_names_of_the_table() -> None:
    meter = PrometheusMeter((table.GATEWAY_TOKENS, table.GATEWAY_SECONDS, table.GATEWAY_UNDER_WAY))
    meter.add(table.GATEWAY_TOKENS, 3, kind="prompt")
    meter.observe(table.GATEWAY_SECONDS, 0.3, route="/x")
    meter.set(table.GATEWAY_UNDER_WAY, 2)
    text = meter.exposition().decode()
    assert 'mmrl_gateway_tokens_total{kind="prompt"} 3.0' in text
    assert 'mmrl_gateway_request_seconds_bucket{le="0.5",route="/x"} 1.0' in text
    assert 'mmrl_gateway_request_seconds_bucket{le="0.2",route="/x"} 0.0' in text
    assert "mmrl_gateway_requests_under_way 2.0" in text


class Recorded:
    """In place of Ray's metric objects."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, float, dict[str, str]]] = []
        self.twice = threading.Event()

    def _take(self, how: str, value: float, tags: dict[str, str]) -> None:
        self.calls.append((how, value, tags))
        if len(self.calls) == 2:
            self.twice.set()
        if self.error is not None:
            raise self.error

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self._take("inc", value, tags)

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._take("set", value, tags)


def test_gauges_are_set_again_and_counters_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Recorded] = {}

    def instrument(metric: table.Metric) -> Recorded:
        return made.setdefault(metric.name, Recorded())

    monkeypatch.setattr(ray_meter, "_instrument", instrument)
    meter = RayMeter(run="r", beat_s=0.01)
    looked = threading.Event()
    meter.watch(looked.set)
    meter.add(table.GROUPS, 4)
    meter.set(table.LOSS, 0.5)
    assert made["mmrl_loss"].twice.wait(20)
    assert looked.wait(20)
    meter.close()
    assert made["mmrl_groups"].calls == [("inc", 4.0, {"run": "r"})]
    assert set(map(str, made["mmrl_loss"].calls)) == {str(("set", 0.5, {"run": "r"}))}


@pytest.mark.parametrize("where", ["made", "used", "watched"])
def test_what_ray_refuses_is_said_once_and_stops_nobody(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def instrument(metric: Any) -> Recorded:
        if where == "made":
            raise RuntimeError("no agent")
        return Recorded(RuntimeError("no agent"))

    monkeypatch.setattr(ray_meter, "_instrument", instrument)
    meter = RayMeter(run="r", beat_s=0.01)
    with caplog.at_level(logging.WARNING):
        if where == "watched":
            asked = threading.Event()

            def fail() -> None:
                if asked.is_set():
                    again.set()
                asked.set()
                raise RuntimeError("no agent")

            again = threading.Event()
            meter.watch(fail)
            assert again.wait(20)
        else:
            meter.add(table.GROUPS)
            meter.add(table.GROUPS)
        meter.close()
    what = "what is watched" if where == "watched" else "mmrl_groups"
    assert [r.getMessage() for r in caplog.records] == [f"metrics: {what} is not measured: RuntimeError: no agent"]
