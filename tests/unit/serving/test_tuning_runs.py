"""What a run folder tells over HTTP, read from one that is written here by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.serving.job_service import open_run, results, run_checkpoints, run_events, trained_tokens

BEGUN = 1_700_000_000


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path, "smol-1")
    for step in range(3):
        figures = {"loss": 0.5 / (step + 1), "reward/mean": 0.1 * step, "kl": None, "tokens/completion": 100.0 + step}
        run.append_line("metrics.jsonl", {"step": step, "seconds/step": 1.0, **figures})
        if step < 2:
            run.write_bytes(f"rollouts/step-{step:06d}.parquet", b"x")
            os.utime(run.full_path(f"rollouts/step-{step:06d}.parquet"), (0, BEGUN + 10 + step))
    run.append_line("events.jsonl", {"time": BEGUN + 5.5, "kind": "worker_died", "worker": "w0", "detail": "killed"})
    run.append_line("events.jsonl", {"kind": "learner_path", "path": "shared_prefix"})
    for step in (1, 2):
        run.write_json(f"checkpoints/step-{step:06d}/manifest.json", {"files": {}, "step": step})
        os.utime(run.full_path(f"checkpoints/step-{step:06d}/manifest.json"), (0, BEGUN + 20 + step))
    run.write_bytes("checkpoints/step-000003/state.json", b"{}")  # its writer died
    run.write_json("summary.json", {})
    return run


def test_events_have_the_figures_of_each_step_and_what_befell_the_run(run: RunDir) -> None:
    events = list(run_events(run, "ftjob-1", BEGUN))
    assert len({event.id for event in events}) == len(events) == 5
    steps, others = events[:3], events[3:]
    assert [event.created_at for event in steps] == [BEGUN + 10, BEGUN + 11, BEGUN], "the last is not written yet"
    assert steps[1].data == {"step": 2, "train_loss": 0.25, "reward_mean": 0.1}
    assert steps[1].message == "Step 2: train_loss=0.25, reward_mean=0.1"
    assert [(e.level, e.created_at) for e in others] == [("warn", BEGUN + 5), ("info", BEGUN)]
    assert others[0].message == "worker died: worker=w0, detail=killed"
    run.append_line("events.jsonl", {"kind": "late"})
    assert [event.id for event in run_events(run, "ftjob-1", BEGUN)][:5] == [event.id for event in events], "they stay"


def test_checkpoints_are_those_that_were_committed(run: RunDir) -> None:
    newest, oldest = run_checkpoints(run, "ftjob-1")
    assert (newest.step_number, oldest.step_number) == (2, 1)
    assert newest.fine_tuned_model_checkpoint == "smol-1:ckpt-step-2"
    assert newest.created_at == BEGUN + 22
    assert newest.metrics == {"step": 2, "train_loss": 0.25, "reward_mean": 0.1}


def test_tokens_and_results(run: RunDir, tmp_path: Path) -> None:
    assert trained_tokens(run) == 303
    assert results(run) == ("summary.json", "metrics.jsonl")
    assert open_run(f"{tmp_path}/none") is None
    found = open_run(run.location)
    assert found is not None
    assert found.location == run.location
