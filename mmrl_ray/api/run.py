"""`Run`: a run's folder as a program or a notebook looks at it, finished, unfinished or in progress; and `load_run`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

from mmrl_ray.config.paths import RUN_CONFIG, find_run, is_run
from mmrl_ray.errors import ConfigError, RunError
from mmrl_ray.run_records.checkpoint_choice import best_step, evaluation_lines
from mmrl_ray.run_records.run_dir import RunDir, checkpoint_steps, steps_in
from mmrl_ray.run_records.step_log import EVENTS, METRICS_FILE

if TYPE_CHECKING:
    from pandas import DataFrame

    from mmrl_ray.config import Config
    from mmrl_ray.evaluation.captioning import ImageLike
    from mmrl_ray.evaluation.evaluate import TargetEvaluation
    from mmrl_ray.evaluation.frames import Captions, Picture
    from mmrl_ray.evaluation.scores import Evaluation
    from mmrl_ray.report.charts import Drawing

__all__ = ["Run", "load_run"]

_SIDES = ("before", "after")
_ROLLOUTS = "rollouts"
_SUMMARY = "summary.json"


def load_run(run: str | os.PathLike[str] | Run, *, root: str = "runs") -> Run:
    """A run to look at, in whatever state it is: of this version or an earlier one, on this machine or elsewhere.

    Args:
        run: its folder, a URI (`s3://bucket/runs/mine`), or its name in `root`.
        root: folder of runs, or a URI.

    Raises:
        ConfigError: that is no run; with the nearest name that there is.
        RunError: it cannot be read.
    """
    name = os.fspath(run)
    is_elsewhere = "://" in root and not os.path.dirname(name) and not is_run(name)
    found = RunDir.open(root, name) if is_elsewhere else RunDir.at(find_run(name, root))
    if not found.exists(RUN_CONFIG):  # a URI, of which nothing was looked at yet
        raise ConfigError(f"{found.location} is no run folder: it has no {RUN_CONFIG}")
    return Run(found)


class Run:
    """One run. Everything is read from its folder when it is asked for: of a run in progress, what there is by then."""

    def __init__(self, folder: RunDir) -> None:
        self._folder = folder

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its name."""
        return self._folder.name

    @property
    def location(self) -> str:
        """Where it lies: an absolute path, or a URI."""
        return self._folder.location

    @property
    def config(self) -> Config:
        """The resolved config.

        Raises:
            ConfigError: this version cannot read it.
        """
        from mmrl_ray.config.load import parse_config

        return parse_config(self._folder.read_text(RUN_CONFIG), self._folder.full_path(RUN_CONFIG))

    @property
    def status(self) -> str:
        """How it stands: `starting`, `running`, `ending`; `finished`, `interrupted`, `failed`; `dead`, `unknown`."""
        from mmrl_ray.jobs.control import run_facts

        return str(run_facts(self._folder)["state"])

    @property
    def error(self) -> str | None:
        """Why it failed; None of a run that did not."""
        status, _, why = str(self.summary.get("status", "")).partition(": ")
        return why or "no reason is known" if status == "failed" else None

    @property
    def summary(self) -> dict[str, Any]:
        """`summary.json`: seconds by phase, peak memory, versions, evaluations; empty before the run has ended."""
        found = self._folder.read_json(_SUMMARY) if self._folder.exists(_SUMMARY) else {}
        return found if isinstance(found, dict) else {}

    @property
    def step(self) -> int:
        """Steps that are finished."""
        lines = self._lines
        return int(lines[-1].get("step", len(lines) - 1)) + 1 if lines else 0

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint so far; None of a run that is not evaluated while it learns."""
        return best_step(self._folder)

    @property
    def checkpoints(self) -> list[int]:
        """Steps that have a checkpoint to go on from, or to evaluate."""
        return checkpoint_steps(self._folder)

    # -- what it has measured --------------------------------------------------------------------------------------

    @property
    def metrics(self) -> DataFrame:
        """A row a step, by `step`; a column a metric, NaN where a step has none. Empty before the first."""
        return _by_step(self._lines)

    @property
    def events(self) -> DataFrame:
        """A row an event: when (UTC), of which kind, and what it says."""
        import pandas as pd

        frame = pd.DataFrame(self._folder.read_lines(EVENTS))
        if "time" in frame:
            frame["time"] = pd.to_datetime(frame["time"], unit="s", utc=True)
        return frame

    @property
    def evaluations(self) -> DataFrame:
        """A row a measure of each evaluation: `when`, `step`, `measure`, `value`, `low` and `high` (of 95 %).

        `when` is before, learning (`eval.every`) or after; `step` counts the steps that were finished by then.
        """
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        steps = {"before": 0, "after": self.step}
        for side in _SIDES[:1]:
            rows += self._side_rows(side, steps[side])
        for line in evaluation_lines(self._folder):
            for name, each in line["intervals"].items():
                rows.append(("learning", line["step"], name, each["value"], each["low"], each["high"]))
        rows += self._side_rows("after", steps["after"])
        frame = pd.DataFrame(rows, columns=["when", "step", "measure", "value", "low", "high"])
        return frame.astype({"step": "int64", "value": "float64", "low": "float64", "high": "float64"})

    def evaluation(self, when: str = "after") -> Evaluation:
        """The evaluation `before` or `after` reinforcement learning, with each caption and its scores.

        Raises:
            ConfigError: `when` is neither.
            RunError: the run has none, or not yet.
        """
        from mmrl_ray.evaluation.records import load_evaluation

        if when not in _SIDES:
            raise ConfigError(f"there is no evaluation {when!r}: write 'before' or 'after'")
        found = load_evaluation(self._folder, when)
        if found is None:
            raise RunError(
                f"{self.location} has no evaluation {when} training: it has not got there, or has no data.eval"
            )
        return found

    def captions(self, source: str = _ROLLOUTS, *, steps: int | Iterable[int] | None = None) -> Captions:
        """What was said: a row a caption, with sample, picture, caption, reward and its parts.

        Args:
            source: `rollouts`, all that was sampled to learn from, with step, place in the group, advantage, why a
                caption was masked; or `before` or `after`, the captions of that evaluation, with references and scores.
            steps: of rollouts only those, negative ones from the last: `steps=-1`. A long run's log is large.

        Raises:
            ConfigError: there is no such source or step.
            RunError: there is nothing yet, or it cannot be read.
        """
        if source == _ROLLOUTS:
            return self._sampled(steps)
        if source not in _SIDES:
            raise ConfigError(f"there are no captions {source!r}: write 'rollouts', 'before' or 'after'")
        if steps is not None:
            raise ConfigError(f"steps={steps!r} is of rollouts, and captions {source!r} are of an evaluation")
        from mmrl_ray.evaluation.frames import evaluation_captions

        return evaluation_captions(self.evaluation(source), self._picture)

    # -- what is drawn ---------------------------------------------------------------------------------------------

    def figure(self, *names: str, title: str = "") -> Drawing:
        """A matplotlib figure of metrics over steps; without names of the reward.

            run.figure("reward/mean")
            run.figure("loss", "kl")
            run.figure("reward/")           # a family
            run.figure("eval/cider_d")      # of evaluations while the run learns

        Raises:
            ConfigError: there is no metric of that name: says which are near.
        """
        from mmrl_ray.report.charts import draw

        return draw(names or ("reward/mean",), [*self._lines, *evaluation_lines(self._folder)], title=title)

    def show_report(self, height: int = 800) -> str | None:
        """In a notebook shows the run's report where the cell's output is; elsewhere writes it and returns its path.

        Args:
            height: of the frame, in pixels.

        Raises:
            RunError: a file of the run cannot be read, or outside a notebook the page cannot be written.
        """
        from mmrl_ray.report.page import render_report, write_report
        from mmrl_ray.telemetry.notebook import in_notebook, show_html

        if not in_notebook():
            return write_report(self._folder)
        page = escape(render_report(self._folder), quote=True)
        # It has no scripts, and cannot have any: captions are anybody's.
        frame = f'<iframe srcdoc="{page}" sandbox width="100%" height="{height}" style="border:0"></iframe>'
        show_html(f"<div>{frame}</div>", f"report of {self.name}: {self.location}")
        return None

    # -- what is done with it --------------------------------------------------------------------------------------

    def evaluate(self, data: str | os.PathLike[str] | None = None, **options: Any) -> TargetEvaluation:
        """`mmrl_ray.evaluate` of this run."""
        from mmrl_ray.api.inference import evaluate

        return evaluate(self, data, **options)

    def caption(self, images: ImageLike | Iterable[ImageLike], **options: Any) -> Any:
        """`mmrl_ray.caption` by this run."""
        from mmrl_ray.api.inference import caption

        return caption(self, images, **options)

    def resume(self, **options: Any) -> Run:
        """`mmrl_ray.train` goes on with it; `overrides={"learner.steps": 200}` lets it learn for longer."""
        from mmrl_ray.api.training import train

        return train(resume=self, **options)

    # -- how it is shown -------------------------------------------------------------------------------------------

    def __fspath__(self) -> str:
        return self.location

    def __str__(self) -> str:
        return self.location

    def __repr__(self) -> str:
        return f"Run({self.location!r}, {self.status}, {self.step} steps)"

    def _repr_html_(self) -> str:
        rows = [("status", self.status if self.error is None else f"failed: {self.error}"), ("steps", str(self.step))]
        if self.best_step is not None:
            rows.append(("best step", str(self.best_step)))
        if (seconds := self.summary.get("seconds", {}).get("total")) is not None:
            rows.append(("seconds", f"{seconds:.0f}"))
        rows += [(f"{name}, held out", told) for name, told in self._gains()]
        rows.append(("folder", self.location))
        cells = "".join(
            f'<tr><th style="text-align:left">{escape(k)}</th><td style="text-align:left">{escape(v)}</td></tr>'
            for k, v in rows
        )
        return f"<b>{escape(self.name)}</b><table>{cells}</table>"

    # -- beneath ---------------------------------------------------------------------------------------------------

    @property
    def _lines(self) -> list[dict[str, Any]]:
        return self._folder.read_lines(METRICS_FILE)

    def _side_rows(self, side: str, step: int) -> list[tuple[Any, ...]]:
        from mmrl_ray.evaluation.frames import measures_frame
        from mmrl_ray.evaluation.records import load_evaluation

        found = load_evaluation(self._folder, side)
        return [] if found is None else [(side, step, *row) for row in measures_frame(found).itertuples()]

    def _gains(self) -> Iterable[tuple[str, str]]:
        sides = self.summary.get("eval", {})
        for name in ("reward", "cider_d"):
            values = [sides.get(side, {}).get("measures", {}).get(name, {}).get("value") for side in _SIDES]
            if any(value is not None for value in values):
                yield name, " → ".join("–" if value is None else f"{value:.3f}" for value in values)

    @cached_property
    def _picture(self) -> Callable[[str], Picture]:
        """A picture of the run's `images/` by its hash."""
        from mmrl_ray.evaluation.frames import Picture
        from mmrl_ray.run_records.rollout_log import LoggedPictures

        def read(digest: str) -> bytes | None:
            with suppress(RunError):  # it was not worth keeping, or the run goes on and has written it since
                return LoggedPictures(self._folder)[digest][0]
            return None

        return lambda digest: Picture(digest, read)

    def _sampled(self, steps: int | Iterable[int] | None) -> Captions:
        from mmrl_ray.api.rollouts import rollout_captions

        there = steps_in(self._folder, _ROLLOUTS, ".parquet")
        if not there:
            raise RunError(f"{self.location} has no rollout log: no step was finished yet")
        wanted = there if steps is None else [_chosen(step, there) for step in _several(steps)]
        return rollout_captions(self._folder, wanted, self._picture)


def _several(steps: int | Iterable[int]) -> Sequence[int]:
    return [steps] if isinstance(steps, int) else [*steps]


def _chosen(step: int, there: Sequence[int]) -> int:
    if -len(there) <= step < 0:
        return there[step]
    if step not in there:
        raise ConfigError(f"the rollout log has no step {step}: it has {there[0]} to {there[-1]}, or -1 for the last")
    return step


def _by_step(lines: Sequence[Mapping[str, Any]]) -> DataFrame:
    import pandas as pd

    frame = pd.DataFrame(lines, columns=list(dict.fromkeys(key for line in lines for key in line)))
    for name in frame.columns:
        values = [value for value in frame[name] if value is not None]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            frame[name] = pd.to_numeric(frame[name])  # what is null in a step is NaN, not an object
    return frame.set_index("step") if "step" in frame else frame.rename_axis("step")
