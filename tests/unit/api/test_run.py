"""Runs as Python sees them: one of version 0.1.0, one in progress, one elsewhere; and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pyarrow import fs

import mmrl_ray
from mmrl_ray import Config, Run, load_run
from mmrl_ray.errors import ConfigError, DataError, RunError
from mmrl_ray.run_records.control_files import write_status
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.telemetry.terminal import RunProgress

BEFORE = Path(__file__).parents[2] / "data" / "run_of_before" / "runs" / "before"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Of version 0.1.0, stopped after three steps."""
    shutil.copytree(BEFORE, tmp_path / "runs" / "before")
    monkeypatch.chdir(tmp_path)
    return load_run("before")


def test_a_run_of_before_is_known_by_name_path_and_uri(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "before"
    for one in (run, folder, str(folder), f"file://{folder}", "runs/before"):
        found = load_run(one)
        assert (found.name, found.status, found.step, found.best_step) == ("before", "interrupted", 3, None)
        assert found.checkpoints == [3]
    assert load_run("before", root=f"file://{tmp_path}/runs").step == 3
    assert isinstance(run.config, Config)
    assert run.config.algorithm == "grpo"
    assert "interrupted" in run._repr_html_()
    assert str(run) == str(folder)
    assert run.events["kind"].iloc[0] == "run_started"


def test_its_frames_hold_what_its_files_do(run: Run) -> None:
    lines = [json.loads(line) for line in (BEFORE / "metrics.jsonl").read_text().splitlines()]
    assert run.metrics.index.tolist() == [0, 1, 2]
    assert run.metrics["reward/mean"].tolist() == [line["reward/mean"] for line in lines]
    wanted = duckdb.sql(
        f"""select caption, reward, advantage, list_filter(reward_parts, lambda p: p.name = 'fluent')[1].value
        from '{BEFORE}/rollouts/step-000002.parquet'"""
    ).fetchall()
    columns = ["caption", "reward", "advantage", "reward/fluent"]
    found = pd.DataFrame(run.captions(steps=-1)[columns])
    pd.testing.assert_frame_equal(found, pd.DataFrame(wanted, columns=columns))
    assert len(wanted) > 8
    assert run.captions()["step"].unique().tolist() == [0, 1, 2]
    assert run.captions(steps=[0, 2])["step"].unique().tolist() == [0, 2]
    straight = json.loads((BEFORE.parents[1] / "straight.json").read_text())["before"]
    table = run.evaluations.set_index("measure")
    assert set(table["when"]) == {"before"}
    for name, each in straight.items():
        assert table.loc[name, ["value", "low", "high"]].tolist() == pytest.approx(list(each.values())), name
    held_out = run.captions("before")
    assert [c.caption for c in run.evaluation("before").captions] == held_out["caption"].tolist()


def test_captions_have_their_pictures_and_notebooks_show_them(run: Run) -> None:
    rows = run.captions(steps=0)
    picture = rows["picture"].iloc[0]
    assert (BEFORE / "images" / f"{picture.digest}.png").read_bytes() == picture.data
    assert picture.image.size == Image.open(io.BytesIO(picture.data)).size
    best = rows[rows["completion"] >= 0].sort_values("reward").head(3)
    best.loc[best.index[0], "caption"] = "<script>alert(1)</script>"
    html = best._repr_html_()
    assert html.count("<img ") == 3
    assert "<script>" not in html
    assert "3 rows" in html
    shutil.rmtree(Path(run.location) / "images")
    with pytest.raises(DataError, match="is not kept here"):
        run.captions(steps=0)["picture"].iloc[0].data  # noqa: B018
    assert "<img " not in run.captions(steps=0)._repr_html_()


def test_figures_show_what_was_asked_for(run: Run) -> None:
    figure = run.figure("reward/caption", "reward/short", title="Two $parts$")
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    drawn = {str(line.get_label()): line.get_ydata().tolist() for line in axes.get_lines()}  # type: ignore[union-attr]
    assert drawn == {name: run.metrics[name].tolist() for name in ("reward/caption", "reward/short")}
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert run.figure().axes[0].collections, "the reward has a band of its spread"
    family = run.figure("reward_weight/").axes[0].get_lines()
    assert {str(line.get_label()) for line in family} == {f"reward_weight/{p}" for p in ("caption", "fluent", "short")}
    with pytest.raises(ConfigError, match=r"no metric reward/maen; did you mean reward/mean"):
        run.figure("loss", "reward/maen")
    with pytest.raises(ConfigError, match=r"no metric zzz; there are .*reward/, "):
        run.figure("zzz")


def test_a_run_in_progress_shows_what_there_is_by_then(run: Run) -> None:
    folder = RunDir.at(run.location)
    write_status(folder, "running", 60.0)
    assert (run.status, run.error) == ("running", None)
    with Path(run.location, "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/mean": null, "late": 1.5}\n{"step": 4, "rew')
    metrics = run.metrics
    assert metrics.index.tolist() == [0, 1, 2, 3]
    assert metrics["reward/mean"].isna().tolist() == [False, False, False, True]
    assert metrics["late"].dtype == metrics["reward/mean"].dtype == "float64"
    write_status(folder, "running", -1.0)
    assert run.status == "dead"


def test_a_run_that_has_just_begun_has_nothing_yet(tmp_path: Path) -> None:
    folder = RunDir.create(tmp_path, "new")
    folder.write_text("config.yaml", "")
    run = load_run(folder.location)
    assert (run.status, run.step, run.best_step, run.summary) == ("unknown", 0, None, {})
    assert run.metrics.empty
    assert run.evaluations.empty
    for ask, told in ((run.captions, "no step was finished"), (lambda: run.captions("after"), "no evaluation after")):
        with pytest.raises(RunError, match=told):
            ask()
    with pytest.raises(ConfigError, match="no step was finished yet"):
        run.figure()
    assert "unknown" in run._repr_html_()


def test_a_run_on_another_file_system_is_read_all_the_same(run: Run, tmp_path: Path) -> None:
    elsewhere = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    far = Run(RunDir(elsewhere, "runs/before", "s3://bucket/runs/before"))
    pd.testing.assert_frame_equal(far.metrics, run.metrics)
    assert far.captions(steps=0)["picture"].iloc[0].data == run.captions(steps=0)["picture"].iloc[0].data
    assert repr(far) == "Run('s3://bucket/runs/before', interrupted, 3 steps)"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda run: load_run("befoer"), "no such run folder: befoer; did you mean runs/before?"),
        (lambda run: load_run("runs"), "runs is no run folder: it has no config.yaml"),
        (lambda run: load_run(f"file://{run.location}/images"), "images is no run folder: it has no config.yaml"),
        (lambda run: load_run("runs/before/config.yaml"), "config.yaml is a file: a run is a folder"),
        (lambda run: run.captions("during"), "no captions 'during': write 'rollouts', 'before' or 'after'"),
        (lambda run: run.captions(steps=7), "no step 7: it has 0 to 2"),
        (lambda run: run.captions("before", steps=1), "steps=1 is of rollouts"),
        (lambda run: run.evaluation("now"), "no evaluation 'now'"),
    ],
)
def test_what_is_not_there_is_refused_by_name(run: Run, make: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(run)
    assert told in str(caught.value)


class Kernel:
    """What IPython is to us: a shell with a kernel, and outputs that may be changed later."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, str]] = []
        self.kernel = True

    def display(self, data: dict[str, str], *, raw: bool, display_id: bool = False) -> Any:
        assert raw
        place = len(self.outputs)
        self.outputs.append(data)
        return SimpleNamespace(update=lambda new, raw: self.outputs.__setitem__(place, new))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    display = SimpleNamespace(display=made.display)
    monkeypatch.setitem(
        sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: made, display=display, version_info=(9, 0))
    )  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "IPython.display", display)  # type: ignore[misc]
    return made


def test_the_report_is_a_frame_that_can_run_nothing(run: Run, kernel: Kernel) -> None:
    assert run.show_report(height=321) is None
    (shown,) = kernel.outputs
    assert '" sandbox width="100%" height="321"' in shown["text/html"]
    assert "&lt;!doctype html&gt;" in shown["text/html"].lower()
    assert shown["text/plain"] == f"report of before: {run.location}"
    del kernel.kernel  # IPython on a terminal
    path = run.show_report()
    assert path is not None
    assert "caption" in Path(path).read_text()


def test_progress_in_a_notebook_is_one_output_whose_last_line_moves(kernel: Kernel) -> None:
    now = [0.0]
    with RunProgress(clock=lambda: now[0]) as shown:
        shown.note("begun <here>")
        update = shown.phase("learning")
        for step in (1, 2, 3):
            now[0] += 10
            update(step, 3, {"reward": step / 10})
            assert len(kernel.outputs) == 1
        shown.note("done")
    (output,) = kernel.outputs
    begun, learnt, done = output["text/plain"].splitlines()
    assert begun == "[   0.0s] begun <here>"
    assert learnt.startswith("[  30.0s] learning 3/3")
    assert done == "[  30.0s] done"
    assert "begun &lt;here&gt;" in output["text/html"]


def test_the_package_says_what_it_offers_and_loads_none_of_it() -> None:
    assert {"train", "evaluate", "caption", "load_run", "Run", "Config"} <= set(dir(mmrl_ray)) & set(mmrl_ray.__all__)
    assert (Path(mmrl_ray.__file__).parent / "py.typed").is_file()
