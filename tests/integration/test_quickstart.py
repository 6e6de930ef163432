"""The quickstart, whole: what `make quickstart` runs after the install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmrl_ray.data.samples import read_split

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_it_ends_with_better_captions_on_what_it_never_saw(tmp_path: Path) -> None:
    # With as many threads as a user has: sums depend on them, and with them what it learns.
    not_a_users = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in not_a_users}
    done = subprocess.run(
        [sys.executable, "-m", "mmrl_ray.cli", "train", str(ROOT / "configs" / "quickstart.yaml")],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "peak resident" in done.stdout
    run = tmp_path / "runs" / "quickstart"
    summary = json.loads((run / "summary.json").read_text())
    before, after = (summary["eval"][side]["measures"] for side in ("before", "after"))
    for measure in ("reward", "cider_d"):
        assert after[measure]["low"] > before[measure]["high"], (measure, before[measure], after[measure])
    assert after["attributes/recall"]["low"] > before["attributes/recall"]["high"], "more of what is there is said"
    assert summary["peak_memory_bytes"] < 5e9
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(step["shared_prefix"] and step["masked"] == 0 and step["dropped"] == 0 for step in steps)
    measured = [step["importance/image"] for step in steps if "importance/image" in step]
    assert len(measured) == 6
    assert min(measured) > 0, "the policy looks"
    assert all((run / "analysis" / f"{side}.parquet").is_file() for side in ("before", "after"))
    assert summary["correlations"]["after"]["text"]["rho"] is None, "one prompt for all"
    assert summary["correlations"]["after"]["image"]["rho"] > 0.3, "what it says goes with what it sees"
    captions = {sample.id for sample in read_split(tmp_path / "data" / "scenes" / "eval", prompt="")}
    assert summary["eval"]["after"]["samples"] == len(captions)
