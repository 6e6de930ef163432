"""The real libraries, offline: what a run, its resume and its end tell them is read back with their own readers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmrl_ray.tracking.base import About
from mmrl_ray.tracking.tensorboard import TensorBoard
from tests.unit.report.test_report import HOSTILE
from tests.unit.tracking.told import Folder

REDONE = 100.0
"""Added to the reward of steps that are done again, by which they can be told apart."""


@dataclass
class Read:
    """What there is."""

    rewards: list[tuple[int, float]]
    """Step and value of `reward/mean`, all of them, in order of steps."""
    evaluations: list[tuple[int, float]]
    captions: str
    """Some text that has all captions."""
    pictures: int
    artifacts: set[str] = field(default_factory=set)
    histograms: dict[str, Any] = field(default_factory=dict)


def told(root: Path, tracker: str, *more: str) -> Folder:
    """Four steps, killed; back to step 2 and on to six, finished."""
    first = Folder(root, f"tracking.to=[{tracker}]", *more)
    with first.tracked() as tracking:
        first.steps(0, 4)
        first.evaluate(2)
        first.sample(2)
        tracking.finish(failed=True)
    second = Folder(root, f"tracking.to=[{tracker}]", *more, "learner.lr=1e-3")
    with second.tracked() as tracking:
        second.back_to(2)
        second.steps(2, 6, lambda step: step + REDONE)
        second.evaluate(4)
        second.sample(4)
        second.ends()
        tracking.finish(failed=False)
    assert second.events() == []
    return second


def checked(found: Read, id: str, artifacts: set[str]) -> None:
    """Each step once; a step that was done again stands as it was told first."""
    assert found.rewards == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 4 + REDONE), (5, 5 + REDONE)]
    assert found.evaluations == [(2, 0.125), (4, 0.125)]
    for caption in ("good", "poor", "a <b> caption", "a | reference"):
        assert caption in found.captions
    assert found.pictures == 4, "one of each evaluation, one of each look"
    assert found.artifacts == artifacts
    assert id


def test_tensorboard_shows_what_was_done_last(tmp_path: Path) -> None:
    folder = told(tmp_path, "tensorboard")
    board = EventAccumulator(str(tmp_path / "told" / "tb"), size_guidance={"images": 0, "tensors": 0})
    board.Reload()

    def scalars(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in board.Scalars(name)]

    assert scalars("reward/mean") == [(0, 0.0), (1, 1.0), *((step, step + REDONE) for step in range(2, 6))]
    assert scalars("eval/cider_d") == [(2, 0.125), (4, 0.125)], "what is of step 2 itself was not done again"
    assert scalars("named [x]")[0] == (0, 1.5)
    assert [event.step for event in board.Images("samples/0")] == [2, 4]
    assert [event.step for event in board.Images("eval/captions/0")] == [2, 4]
    text = board.Tensors("samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| fixed | s-9 | good | 0.75 | poor | 0.25 | this |" in text
    assert "learner:" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    histogram = board.Histograms("samples/reward")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (3, 0.25, 0.75, 1.5)
    assert len(list((tmp_path / "told" / "tb").iterdir())) == 2
    assert folder.notes.lines == []


def test_tensorboard_takes_names_as_they_are(tmp_path: Path) -> None:
    board = TensorBoard(About("r", "p", {}, str(tmp_path)))
    board.open()
    board.metrics(0, {f"reward/{name}": 1.0 for name in HOSTILE})
    board.close(False)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {f"reward/{name}" for name in HOSTILE} <= set(events.Tags()["scalars"])


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mmrl_ray[wandb]'")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    folder = told(tmp_path, "wandb", "tracking.wandb={mode: offline, group: g, tags: [t]}")
    written = sorted((tmp_path / "told" / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in written] == [f"run-{folder.id('wandb')}.wandb"] * 2, "the resume is of the same id"
    records = [record for path in written for record in wandb_records(path)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.run_id, run.project, run.display_name, run.run_group) for run in runs} == {
        (folder.id("wandb"), "captions", "told", "g")
    }
    rows = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    files = [path for path in (tmp_path / "told" / "wandb").glob("offline-run-*/files/media/**/*") if path.is_file()]
    found = Read(
        [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row],
        [(row["step"], row["eval/cider_d"]) for row in rows if "eval/cider_d" in row],
        " ".join(path.read_text() for path in files if path.suffix == ".json"),
        sum(value for row in rows for key, value in row.items() if key.endswith("/pictures/count")),
        {record.artifact.name for record in records if record.HasField("artifact")},
    )
    names = {name for name in found.artifacts if not name.startswith("run-")}
    found.artifacts = {name.removesuffix(f"-{folder.id('wandb')}") for name in names}
    checked(found, folder.id("wandb"), {"adapter", "report"})
    assert [sum(row["samples/reward/values"]) for row in rows if "samples/reward/values" in row] == [3, 3]
    assert all(
        "0123456789" * 4 not in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()
    )


def wandb_records(path: Path) -> Iterator[Any]:
    """Of W&B's log: blocks of 32 KiB of LevelDB's format behind a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, part = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        if not kind:
            return
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def test_mlflow_on_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'mmrl_ray[mlflow]'")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    folder = told(tmp_path, "mlflow", f"tracking.mlflow.uri={uri}")
    client, id = mlflow.MlflowClient(uri), folder.id("mlflow")

    def history(name: str) -> list[tuple[int, float]]:
        return sorted((metric.step, metric.value) for metric in client.get_metric_history(id, name))

    run = client.get_run(id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "told")
    assert client.get_experiment(run.info.experiment_id).name == "captions"
    assert (run.data.params["learner.steps"], run.data.params["learner.lr"]) == (
        "6",
        str(Folder(tmp_path).cfg.learner.lr),
    )
    assert run.data.tags["changed.learner.lr"] == "0.001"
    assert (run.data.tags["final.status"], run.data.tags["final.best_step"]) == ("finished", "2")
    assert len(client.search_runs([run.info.experiment_id])) == 1
    pages = [Path(run.info.artifact_uri.removeprefix("file://"), each) for each in ("samples", "eval/captions")]
    texts = [path.read_text() for page in pages for path in sorted(page.glob("*.html"))]
    found = Read(
        history("reward/mean"),
        history("eval/cider_d"),
        " ".join(path.read_text() for page in pages for path in sorted(page.glob("*.json"))),
        sum(text.count("data:image/png") for text in texts),
        {each.path for each in client.list_artifacts(id)} - {"samples", "eval", "config.yaml"},
    )
    assert "a &lt;b&gt; caption" in " ".join(texts)
    checked(found, id, {"adapter", "report.html"})
    assert "lr: 0.001" in Path(run.info.artifact_uri.removeprefix("file://"), "config.yaml").read_text()
    assert history("samples/reward/p50") == [(2, 0.5), (4, 0.5)]
    assert history("named _x_")[0] == (0, 1.5)


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed: it needs Pillow below 13; pip install 'mmrl_ray[trackio]' elsewhere")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = told(tmp_path, "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(importlib.import_module("trackio.sqlite_storage"), "TRACKIO_DIR", tmp_path / "trackio")
    rows = SQLiteStorage.get_logs("captions", folder.id("trackio"))
    tables = [row[name] for row in rows for name in ("samples", "eval/captions") if name in row]
    cells = [cell for table in tables for line in table["_value"] for cell in line.values()]
    found = Read(
        [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row],
        [(row["step"], row["eval/cider_d"]) for row in rows if "eval/cider_d" in row],
        json.dumps(tables),
        len([cell for cell in cells if isinstance(cell, dict) and cell.get("_type") == "trackio.image"]),
    )
    checked(found, folder.id("trackio"), set())
    counts = next(row["samples/reward"] for row in rows if "samples/reward" in row)
    assert math.isclose(sum(counts["values"]), 3)
    assert list((tmp_path / "trackio" / "artifacts" / "captions").rglob("*"))
