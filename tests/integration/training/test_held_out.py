"""Evaluations beside the learning, through the command line, on a real Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmrl_ray.run_records.run_dir import RunDir

from .conftest import Workplace
from .test_train import assert_same_adapter, metrics

pytestmark = pytest.mark.timeout(600)
MINE = {"every": 2, "metrics": ["cider_d", "rouge_l", "reward"], "metric": "rouge_l"}


def lines(run: Path) -> list[dict[str, Any]]:
    return RunDir.at(run).read_lines("eval/steps.jsonl")


def files(folder: Path) -> dict[str, bytes]:
    found = [file for file in folder.iterdir() if file.is_file() and file.name != "manifest.json"]
    return {file.name: file.read_bytes() for file in found}


def test_evaluations_change_nothing_that_is_learned_and_a_resume_makes_them_again_bit_for_bit(
    workplace: Workplace,
) -> None:
    """The judge of what is learned is a run without them; that of the resume the run that nobody stopped."""
    keep = {**workplace.settings["learner"], "keep_checkpoints": 9}
    workplace.mmrl("train", workplace.config("unwatched", learner=keep))
    looked = {**keep, "blind_check": {"every": 2, "samples": 4}}
    told = workplace.mmrl("train", workplace.config("watched", learner=looked, eval=MINE))
    plain, run = workplace.runs / "unwatched", workplace.runs / "watched"
    assert not (plain / "adapter-last").exists()
    assert files(run / "adapter-last") == files(plain / "adapter"), "bit for bit"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{n:06d}" for n in (2, 3, 4, 6)]

    found, looks = lines(run), (run / "eval" / "blind.jsonl").read_text()
    assert [each["step"] for each in found] == [0, 2, 4, 6]
    assert [json.loads(each)["step"] for each in looks.splitlines()] == [0, 2, 4, 6]
    before, after = (json.loads((run / "summary.json").read_text())["eval"][side]["measures"] for side in
                     ("before", "after"))  # fmt: skip
    for name in MINE["metrics"]:
        assert found[0][f"eval/{name}"] == before[name]["value"]
        assert found[-1][f"eval/{name}"] == after[name]["value"]
    best = found[-1]["best"]
    assert files(run / "adapter").items() <= files(run / "checkpoints" / f"step-{best:06d}").items()
    assert f"adapter/ is the best checkpoint, of step {best}" in told
    assert "which chooses the best checkpoint" in (run / "report.html").read_text()
    assert not any(key.startswith("eval/") for line in metrics(run) for key in line), "a step's line is of the step"

    # As a machine that went down in step 4 leaves it, when nothing of the evaluation of step 2 had come yet.
    cut = workplace.runs / "cut"
    shutil.copytree(run, cut)
    for gone in ("checkpoints/step-000004", "checkpoints/step-000006", "adapter", "adapter-last"):
        shutil.rmtree(cut / gone)
    for gone in ("eval/after.parquet", "eval/step-000002.parquet", "owner.json"):
        (cut / gone).unlink(missing_ok=True)
    (cut / "eval" / "steps.jsonl").write_text(json.dumps(found[0]) + "\n")
    (cut / "eval" / "blind.jsonl").write_text(looks.splitlines()[0] + "\n")
    workplace.mmrl("train", "--resume", cut)
    assert lines(cut) == found
    assert (cut / "eval" / "blind.jsonl").read_text() == looks
    for folder in ("adapter", "adapter-last"):
        assert files(cut / folder) == files(run / folder)
    assert_same_adapter(cut, run)

    # One of them and the other, by name.
    picture = next((run / "images").iterdir())
    said = {which: workplace.call("caption", "--run", run, picture, "--checkpoint", which) for which in ("best", "2")}
    assert best != 2 or said["best"] == said["2"]
    assert "there are best" in workplace.call("caption", "--run", run, picture, "--checkpoint", "5", code=1)
    shown = workplace.call("serve", run, "--checkpoint", "last", "--print-config")
    assert f"{run}/adapter-last" in shown


def test_patience_ends_a_run_that_does_not_get_better_and_a_resume_leaves_it_ended(workplace: Workplace) -> None:
    """A policy that learns nothing: every caption stays as it is."""
    still = {**workplace.settings["learner"], "lr": 1e-12}
    patient = {"every": 1, "patience": 2, "min_steps": 4, "metric": "reward"}
    told = workplace.mmrl("train", workplace.config("still", learner=still, eval=patient))
    run = workplace.runs / "still"
    assert "ended after 4 of 6 steps: reward of held-out captions has not risen in 3 evaluations" in told
    assert [each["step"] for each in lines(run)] == [0, 1, 2, 3, 4]
    assert len(metrics(run)) == 4
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["ended_early"]["step"]) == ("finished", 4)
    assert (summary["checkpoints"]["best"]["step"], summary["checkpoints"]["last"]["step"]) == (1, 4)
    manifests = {name: json.loads((run / name / "manifest.json").read_text()) for name in ("adapter", "adapter-last")}
    assert {name: each["step"] for name, each in manifests.items()} == {"adapter": 1, "adapter-last": 4}

    workplace.mmrl("train", "--resume", run)
    assert len(metrics(run)) == 4
    assert json.loads((run / "adapter" / "manifest.json").read_text()) == manifests["adapter"]
