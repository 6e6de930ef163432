"""Whole runs through the command line, on a real Ray."""

from __future__ import annotations

import contextlib
import html.parser
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmrl_ray.data.samples import read_split, write_parquet
from mmrl_ray.jobs.control import RunControl
from mmrl_ray.run_records.run_dir import RunDir

from .conftest import DEADLINE_S, Workplace, wait_for

pytestmark = pytest.mark.timeout(600)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def metrics(run: Path) -> list[dict[str, float]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_same_adapter(first: Path, second: Path) -> None:
    a, b = adapter(first), adapter(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


OWN_REWARD = """
def picky(captions, states, *, digit):
    if any(sample.id.endswith(digit) for sample in states):
        raise ValueError("not this one")
    return [len(set(caption.split())) for caption in captions]
"""


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(run / "rollouts" / f"step-{step:06d}.parquet").to_pylist()


@pytest.fixture(scope="module")
def straight(workplace: Workplace) -> Path:
    """Six steps without a break, with its log as JSON."""
    told = workplace.mmrl("train", workplace.config("straight"), "--set", "run.log_format=json")
    (workplace.folder / "straight.log").write_text(told)
    return workplace.runs / "straight"


def test_a_run_leaves_everything_a_user_looks_for(workplace: Workplace, straight: Path) -> None:
    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(6))
    wanted = ["policy_version", "reward/mean", "reward/std", "reward/caption/bleu", "loss", "loss/policy", "loss/kl"]
    wanted += ["kl", "entropy", "grad_norm", "lr", "staleness/mean", "completion/length_mean", "samples_per_second"]
    wanted += ["reward/fluent/fluency", "reward_weight/caption", "reward_weight/fluent"]
    wanted += ["shared_prefix", "masked", "dropped", "seconds/sample", "seconds/forward_backward"]
    for line in lines:
        assert not [key for key in wanted if key not in line]
        assert line["shared_prefix"] is True
        assert line["staleness/max"] == 0
        assert line["ratio_mean"] == pytest.approx(1.0, abs=1e-5), "on-policy: behaviour and learner agree"
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert {"before", "after", "difference"} <= summary["eval"].keys()
    assert summary["peak_memory_bytes"] > 1e8
    resolved = yaml.safe_load((straight / "config.yaml").read_text())
    assert resolved["reward"]["parts"]["short"]["prefix"] == "", "the template writes nothing before an answer"
    assert list((straight / "tb").iterdir())
    assert not list(straight.glob(".tmp*")), "nothing half-written stays"

    told = [json.loads(line) for line in (workplace.folder / "straight.log").read_text().splitlines()]
    assert {(line["run"], line["role"]) for line in told} == {("straight", "driver")}
    assert any(line["message"] == f"finished: {straight}" for line in told)
    kinds = [event["kind"] for event in RunDir.at(straight).read_lines("events.jsonl")]
    assert (kinds[0], kinds[-1]) == ("run_started", "run_ended")
    assert {"worker_created", "worker_ready", "learner_path"} <= set(kinds)
    assert not (straight / "prometheus.json").exists(), "its metrics are gone"

    page = (straight / "report.html").read_text()
    html.parser.HTMLParser().feed(page)
    assert "straight" in page

    rows = duckdb.sql(
        "select step, index, count(*), count(distinct completion) "
        f"from '{straight}/rollouts/*.parquet' group by step, index"
    ).fetchall()
    assert len(rows) == 6 * 4
    assert all(count == distinct == 3 for _, _, count, distinct in rows)


def test_every_checkpoint_loads_into_its_base_with_peft(workplace: Workplace, straight: Path) -> None:
    base = AutoModelForImageTextToText.from_pretrained(workplace.folder / "base")
    names = sorted(p.name for p in (straight / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000006"]
    loaded = PeftModel.from_pretrained(base, str(straight / "checkpoints" / "step-000006"))
    weights = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    final = adapter(straight)
    assert len(weights) == len(final)
    for name, value in final.items():
        assert torch.equal(weights[name.replace(".weight", ".default.weight")], value)
    assert any(value.abs().sum() > 0 for name, value in final.items() if "lora_B" in name), "it has learnt something"


def test_scaled_from_one_to_three_to_one_nothing_changes_but_the_time(workplace: Workplace, straight: Path) -> None:
    """The judge is the run that nobody scaled."""
    run = workplace.runs / "scaled"
    share = {"cpus": 0.5, "threads": 1}
    process = workplace.start("train", workplace.config("scaled", resources={"rollout": share, "learner": share}))
    wait_for(lambda: len(metrics(run)) >= 1, process, "a step")
    with held_learners():
        assert "3 rollout workers are ready" in workplace.call("scale", run, "--rollout-workers", "3")
        shown = workplace.call("status", run)
        assert all(f"worker-{i}" in shown for i in range(3)), shown
    wait_for(lambda: len(metrics(run)) >= 3, process, "two more steps")
    with held_learners():
        control = RunControl(RunDir.at(run))
        answer = control.request(1, by="a test", timeout_s=DEADLINE_S)
        assert answer.message == "3 → 1 rollout workers"
        control.wait_in_effect(answer, timeout_s=DEADLINE_S)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert_same_adapter(run, straight)
    same = ("reward/mean", "loss", "grad_norm", "lr", "entropy")
    for a, b in zip(metrics(run), metrics(straight), strict=True):
        assert {k: a[k] for k in same} == {k: b[k] for k in same}
    log = f"'{run}/rollouts/*.parquet'"
    counts = duckdb.sql(f"select count(*), max(attempt) from {log} group by step, index, completion").fetchall()
    assert counts == [(1, 0)] * (6 * 4 * 3)
    assert len(duckdb.sql(f"select distinct worker from {log}").fetchall()) >= 2
    assert status(run)["state"] == "finished"
    assert "the run is finished" in workplace.call("scale", run, "--rollout-workers", "2", code=1)


@contextlib.contextmanager
def held_learners() -> Iterator[None]:
    """Within it the learners stand still: whatever the machine is at, the run is not over before the block is."""
    learners = learners_running()
    for process in learners:
        process.suspend()
    try:
        yield
    finally:
        for process in learners:
            process.resume()


def learners_running() -> list[psutil.Process]:
    learners = [p for p in psutil.Process().children(recursive=True) if is_learner(p)]
    assert learners, "no learner runs"
    return learners


def is_learner(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # it may be gone by now
        return "RayTrainWorker" in " ".join(process.cmdline())
    return False


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def test_stopped_twice_and_killed_it_ends_where_the_straight_run_does(workplace: Workplace, straight: Path) -> None:
    """By Ctrl-C in its first evaluation, by Ctrl-C in a step, and by SIGKILL: then from the checkpoint before the
    newest, which is damaged."""
    run = workplace.runs / "stopped"
    process = workplace.begin("train", workplace.config("stopped", learner={"checkpoint_every": 1}))
    assert process.stdout is not None
    said = ""
    while not said.endswith("evaluate (before)\n"):
        line = process.stdout.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGINT)  # an evaluation is not awaited
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, said + output
    assert "stopping: " in output
    assert f"stopped at once; go on with: mmrl train --resume {run}" in output
    assert "Traceback" not in output
    assert not (run / "eval" / "before.parquet").exists()

    done = stopped_in_a_step(workplace, run)

    process = workplace.start("train", "--resume", run)
    wait_for(lambda: (run / "checkpoints" / f"step-{done + 1:06d}").exists(), process, "a checkpoint more")
    learners = learners_running()
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    assert psutil.wait_procs(learners, timeout=DEADLINE_S)[1] == [], "a checkpoint may come until they are gone"
    assert not (run / "adapter").exists()
    newest = max((run / "checkpoints").iterdir())
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    workplace.mmrl("train", "--resume", run)
    assert_same_adapter(run, straight)
    assert [line["step"] for line in metrics(run)] == list(range(6))
    same = ("reward/mean", "loss", "grad_norm", "lr", "entropy")
    for a, b in zip(metrics(run), metrics(straight), strict=True):
        assert {k: a[k] for k in same} == {k: b[k] for k in same}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    damaged = [event["step"] for event in events if event.get("kind") == "checkpoint_damaged"]
    assert damaged == [int(newest.name.removeprefix("step-"))]


def stopped_in_a_step(workplace: Workplace, run: Path) -> int:
    """Resumed as a user does it, in the background of a script, on a Ray of its own, and stopped: the steps done."""
    own_ray = {name: value for name, value in workplace.environment.items() if name != "RAY_ADDRESS"}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = replace(workplace, environment=own_ray).begin("train", "--resume", run)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: len(metrics(run)) >= 1, process, "a step")
    running = {command_of(child) for child in psutil.Process(process.pid).children(recursive=True)}
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, output
    done = len(metrics(run))
    assert done < 5
    assert "stopping: finishing step " in output
    assert "then a checkpoint; Ctrl-C again stops at once" in output
    assert f"stopped after {done} steps" in output
    assert "Traceback" not in output
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    # What a run's own Ray has no use for is not there; what the run is made of, is.
    idlers = ("monitor.py", "dashboard.py", "DatasetManager", "PlacementGroupCleaner", "ray::IDLE")
    assert not [command for command in running if any(name in command for name in idlers)]
    parts = ("RayTrainWorker", "RolloutWorker", "ControllerActor")
    assert [part for part in parts if any(part in command for command in running)] == [*parts], sorted(running)
    return done


def command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):  # it may be gone by now
        return " ".join(process.cmdline())
    return ""


def test_stale_and_with_a_reward_of_its_own_that_fails_at_times(workplace: Workplace) -> None:
    (workplace.folder / "own_rewards.py").write_text(OWN_REWARD)
    mine = {"kind": "function", "path": "own_rewards:picky", "state": "sample", "kwargs": {"digit": "7"}}
    reward = {"parts": {"caption": {"kind": "caption"}, "mine": mine}, "weights": {"caption": 1.0, "mine": 0.5}}
    reward |= {"normalize": "group", "retries": 0}
    rollout = {"max_staleness": 2, "workers": 2}
    config = workplace.config("stale", rollout=rollout, algorithm="rloo", reward=reward, data=torn_data(workplace))
    said = workplace.mmrl("train", config)
    assert "held out: 1 samples left out (torn)" in said
    assert "warning: 1 of 7 held-out pictures (14%) are trained on" in said
    for line in ("Traceback (most recent call last):", "ValueError: not this one"):
        assert f"[reward own_rewards:picky] {line}" in said
    lines = metrics(workplace.runs / "stale")
    assert [line["step"] for line in lines] == list(range(6))
    assert max(line["staleness/max"] for line in lines) in (1, 2)
    assert sum(line["masked"] for line in lines) >= 1, "of one epoch's samples, some end in the digit"
    assert all(line["reward/normalized"] == 1.0 and line["reward/mine"] > 0 for line in lines)
    log = [row for step in range(6) for row in rollouts(workplace.runs / "stale", step)]
    reasons = {row["masked"] for row in log}
    where = f"({workplace.folder}/own_rewards.py:4)"
    assert reasons == {None, f"reward part 'mine' failed: ValueError: not this one {where}"}
    for row in log:
        live = row["masked"] is None
        assert (row["reward"] is not None, row["learning_reward"] is not None) == (live, live)
        assert row["reward_normalization"] == ("group" if live else None)
        assert live != row["sample_id"].endswith("7")


def test_broken_rows_cost_themselves_alone(workplace: Workplace) -> None:
    """Of the run before: a broken picture first in both splits, a prompt that no model takes, one picture in both."""
    run = workplace.runs / "stale"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval"]["after"]["samples"] == 7
    assert [record["sample_id"] for record in summary["left_out"]["held_out"]] == ["torn"]
    (overlap,) = summary["held_out"]["trained_on"]
    assert (overlap["found"], overlap["samples"], overlap["rows"]) == (1, 7, 26)
    events = RunDir.at(run).read_lines("events.jsonl")
    told = {event["kind"]: event["detail"] for event in events if event["kind"].startswith("held_out")}
    assert set(told) == {"held_out_left_out", "held_out_trained_on"}
    assert "1 of 7 held-out pictures (14%) are trained on" in told["held_out_trained_on"]
    page = (run / "report.html").read_text()
    assert "held-out pictures trained on" in page
    quarantined = RunDir.at(run).read_lines("quarantine.jsonl")
    assert {record["where"][-5:] for record in quarantined} <= {"row 0", "ow 25"}
    log = [row for step in range(6) for row in rollouts(run, step)]
    assert {row["prompt"] for row in log} == {"describe the image ."}, "the row of the same id goes on"


def torn_data(workplace: Workplace) -> dict[str, Any]:
    """The workplace's splits with what may be wrong with single rows."""
    train, held_out = (read_split(workplace.folder / name, prompt="") for name in ("train", "eval"))
    torn = replace(train[0], id="torn", images=(b"no picture",))
    write_parquet(workplace.folder / "torn-train", [torn, *train, replace(train[3], prompt="see <image>")])
    write_parquet(workplace.folder / "torn-eval", [torn, *held_out, train[5]])
    return {"train": str(workplace.folder / "torn-train"), "eval": str(workplace.folder / "torn-eval")}


def test_evaluate_and_caption_take_the_run(workplace: Workplace, straight: Path) -> None:
    out = workplace.folder / "evaluation.json"
    text = workplace.call("evaluate", straight, "--data", workplace.folder / "eval", "--out", out)
    assert "cider_d" in text.lower() or "cider" in text.lower()
    after = json.loads((straight / "summary.json").read_text())["eval"]["after"]["measures"]
    found = json.loads(out.read_text())
    assert found["measures"]["reward"]["value"] == pytest.approx(after["reward"]["value"]), "the same greedy captions"
    image = next((straight / "images").iterdir())
    caption = workplace.call("caption", "--run", straight, image)
    assert caption.strip()


def test_an_existing_folder_needs_resume(workplace: Workplace, straight: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*")}
    output = workplace.call("train", workplace.config("straight"), code=1)
    assert "exists already" in output
    assert "--resume" in output
    assert before == {p: p.stat().st_mtime_ns for p in straight.rglob("*")}
