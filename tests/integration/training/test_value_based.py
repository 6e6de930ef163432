"""A value-based run through the command line, on a real Ray: it loses a worker, is scaled, stopped and resumed, and
learns to see."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import yaml

from mmrl_ray.algorithms.dqn.agent import Agent
from mmrl_ray.algorithms.dqn.network import image_features
from mmrl_ray.config.load import parse_config
from mmrl_ray.data.samples import read_split
from mmrl_ray.evaluation.captioning import caption_images
from mmrl_ray.evaluation.model_source import open_target
from mmrl_ray.jobs.control import RunControl
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.run_records.run_dir import STATISTICS, RunDir

from .conftest import DEADLINE_S, Workplace, wait_for

pytestmark = pytest.mark.timeout(600)

MORE_THAN_ENOUGH = 8000
"""Optimiser steps of the run that is stopped: it must not end while a busy machine starts a worker."""
MORE = 160
"""Steps that it takes when it goes on."""
TEMPLATE = [
    ["large", "small"],
    ["red", "green", "blue", "yellow", "purple", "white"],
    ["circle", "square", "triangle", "star"],
    ["top", "bottom"],
    ["left", "right"],
]


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    file = run / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def config(workplace: Workplace) -> Path:
    share = {"cpus": 0.5}
    data = {"train": "one/train", "eval": "one/eval", "scenes": {"train": 300, "eval": 60, "max_objects": 1}}
    settings = {
        "run": {"name": "valued", "root": str(workplace.runs)},
        "model": workplace.settings["model"],
        "data": {**{k: f"{workplace.folder}/{v}" if isinstance(v, str) else v for k, v in data.items()}, "prompt": "."},
        "algorithm": "value_based",
        "value_based": {
            "fusion": "weighted_sum",
            "width": 64,
            "template": TEMPLATE,
            "shaping": {"caption": 1.0},
            "learning_starts": 128,
            "buffer_words": 4000,
        },
        "reward": {
            "host": "inline",
            "parts": {"caption": {"kind": "caption", "alpha": 0.0, "beta": 1.0, "gamma": 0.4, "max_words": 8}},
        },
        "learner": {"steps": MORE_THAN_ENOUGH, "lr": 2e-3, "checkpoint_every": 96},
        "resources": {"rollout": share, "learner": share},
    }
    path = workplace.folder / "valued.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_survives_and_learns_to_see(workplace: Workplace) -> None:
    run = workplace.runs / "valued"
    process = workplace.begin("train", config(workplace))
    wait_for(lambda: len(lines(run, "metrics.jsonl")) >= 2, process, "two rounds")
    control = RunControl(RunDir.at(run))
    (worker,) = control.status()["pool"]["workers"].values()
    os.kill(worker["pid"], signal.SIGKILL)
    wait_for(lambda: any(e["kind"] == "worker_lost" for e in lines(run, "events.jsonl")), process, "a lost worker")
    # Not by the command line: rounds go on while a program starts.
    answer = control.request(2, by="test", timeout_s=DEADLINE_S)
    assert "2 rollout workers are ready" in control.wait_in_effect(answer, timeout_s=DEADLINE_S)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, output
    kept = json.loads((run / "checkpoints" / max(os.listdir(run / "checkpoints")) / "state.json").read_text())
    assert 0 < kept["step"] < MORE_THAN_ENOUGH
    assert kept["words"] > 128

    steps = kept["step"] + MORE
    workplace.mmrl("train", "--resume", run, "--set", f"learner.steps={steps}")
    assert parse_config((run / "config.yaml").read_text(), "config.yaml").learner.steps == steps
    (changed,) = (event["detail"] for event in lines(run, "events.jsonl") if event["kind"] == "config_changed")
    assert changed == f"learner.steps: {MORE_THAN_ENOUGH} → {steps}"
    written = lines(run, "metrics.jsonl")
    assert [line["step"] for line in written] == list(range(0, steps, 8))
    for name in ("reward/mean", "loss", "q/mean", "exploration", "fusion/image", "lr", "seconds/step"):
        assert name in written[-1], sorted(written[-1])
    rates = [line["lr"] for line in written]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.0015 > 0.0001 > rates[-1]
    resumed = next(line for line in written if line["step"] >= kept["step"])
    assert resumed["words"] > kept["words"]
    assert resumed["exploration"] < 0.99
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (
        summary["eval"]["after"]["measures"]["reward"]["low"] > summary["eval"]["before"]["measures"]["reward"]["high"]
    )
    assert (run / "report.html").exists()
    assert list((run / "tb").iterdir())
    captions = duckdb.sql(f"select caption from '{run}/rollouts/*.parquet'").fetchall()
    assert {len(caption.split()) for (caption,) in captions} == {5}
    kinds = {event["kind"] for event in lines(run, "events.jsonl")}
    assert {"run_started", "worker_lost", "workers_scaled", "run_resumed", "run_ended"} <= kinds

    # What the command line shows of it, in this process.
    target = open_target(str(run))
    assert target.agent is not None
    assert target.eval_data is not None
    samples = read_split(target.eval_data, prompt=".")
    images = image_features(target.policy, samples, 16, target.agent.cache)
    agent = target.agent.agent
    blind = Agent(replace(agent.facts, blind=True), agent.network.state_dict())
    reward = build_reward(target.reward, CorpusStatistics.from_json((run / STATISTICS).read_text()))

    def earned(captions: list[str]) -> float:
        return float(np.mean([each.total for each in reward.score_batch(samples, captions)]))

    greedy = earned(agent.captions(images))
    assert greedy == pytest.approx(summary["eval"]["after"]["measures"]["reward"]["value"])
    assert greedy > 3 * earned(agent.captions(images, epsilon=1.0)) > 0
    assert greedy > earned(blind.captions(images))
    picture = workplace.folder / "one.png"
    picture.write_bytes(samples[0].images[0])
    assert caption_images(str(run), [picture]) == [agent.captions(images[:1])]
