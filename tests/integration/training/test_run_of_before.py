"""A run folder that version 0.1.0 wrote, stopped after three of its eight steps, is gone on with by this one.

`tests/data/run_of_before` holds it with its base model and data, as they lay together in /srv/captions: made by commit
a8044a8 with `max_staleness: 1`, so that the next step had been sampled. Of the same run, not stopped, `straight.json`
has what its steps were.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest

from .conftest import Workplace

BEFORE = Path(__file__).parents[2] / "data" / "run_of_before"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    here = tmp_path / "here"
    shutil.copytree(BEFORE, here)
    config = here / "runs" / "before" / "config.yaml"
    config.write_text(config.read_text().replace("/srv/captions", str(here)))
    return config.parent


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_is_reported_evaluated_served_and_resumed(workplace: Workplace, run: Path) -> None:
    done = len(lines(run))
    straight = json.loads((BEFORE / "straight.json").read_text())
    (run / "report.html").unlink(missing_ok=True)
    workplace.call("report", run)
    assert "caption" in (run / "report.html").read_text()
    out = run.parent / "evaluation.json"
    workplace.call("evaluate", run, "--data", run.parents[1] / "eval", "--out", out)
    assert json.loads(out.read_text())["measures"].keys() == straight["before"].keys()
    assert str(run) in workplace.call("serve", run, "--print-config")

    # What had been sampled ahead is in the checkpoint, in the form of that version: it is not sampled again.
    workplace.mmrl("train", "--resume", run)
    written = lines(run)
    assert [line["step"] for line in written] == list(range(len(straight["steps"])))
    rows = duckdb.sql(
        f"select token_ids from '{run}/rollouts/*.parquet' where step = {done} order by index, completion"
    ).fetchall()
    assert [tokens for (tokens,) in rows] == straight["tokens"][done]
    # Another machine may round otherwise, which the steps after it add up.
    for name in ("loss", "reward/mean", "kl"):
        assert written[done][name] == pytest.approx(straight["steps"][done][name], rel=1e-3, abs=1e-5), name
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["eval"]["before"]["measures"] == straight["before"]
