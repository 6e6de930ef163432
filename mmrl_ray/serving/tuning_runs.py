"""What a job's run folder tells about it: events, checkpoints, tokens. Plain files, so any gateway replica may read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pyarrow import fs

from mmrl_ray.errors import RunError
from mmrl_ray.learner.checkpoints import checkpoint_name, checkpoint_steps
from mmrl_ray.policy.adapters import checkpoint_id
from mmrl_ray.rollouts.metrics import METRICS_FILE
from mmrl_ray.rollouts.recorder import rollouts_name
from mmrl_ray.run_dir import MANIFEST, RunDir
from mmrl_ray.serving.protocols import ResultFile, TuningCheckpoint, TuningEvent

EVENTS_FILE = "events.jsonl"
RESULTS = ("summary.json", "report.html", METRICS_FILE)
"""Files of a run that are named as a job's results, where they are there."""
_FIGURES = {"loss": "train_loss", "reward/mean": "reward_mean", "kl": "kl", "entropy": "entropy", "lr": "lr"}
_WORRYING = ("lost", "died", "dead", "damaged", "failed", "replaced", "quarantined", "timeout", "hung")
"""Parts of the kinds of events that one had better look at."""


def open_run(location: str) -> RunDir | None:
    """The run's folder; None while the job has not made it.

    Raises:
        RunError: its storage cannot be read.
    """
    try:
        return RunDir.at(location)
    except RunError as error:
        if error.__cause__ is None:  # not storage that fails
            return None
        raise


def trained_tokens(run: RunDir) -> int:
    """Completion tokens of all steps."""
    return int(sum(line.get("tokens/completion", 0) for line in run.read_lines(METRICS_FILE)))


def results(run: RunDir) -> tuple[str, ...]:
    """Names of the files that a user looks for."""
    return tuple(name for name in RESULTS if run.exists(name))


def result_file(run: RunDir, name: str) -> ResultFile | None:
    """One of `results`, whole; None where it is not there.

    Raises:
        RunError: it cannot be read.
    """
    written = _written(run, name) if name in RESULTS else None
    return None if written is None else ResultFile(name, written, run.read_bytes(name))


def run_events(run: RunDir, job_id: str, begun: int) -> Iterator[TuningEvent]:
    """One for each step, and one for each thing that happened to the run; `begun` is when where nothing tells."""
    for line in run.read_lines(METRICS_FILE):
        step = int(line["step"]) + 1
        figures = _figures(line)
        shown = ", ".join(f"{name}={value:.4g}" for name, value in figures.items() if name != "step")
        when = _written(run, rollouts_name(step - 1)) or begun
        yield TuningEvent(f"ftevent-{job_id}-step-{step:06d}", when, "info", f"Step {step}: {shown}", figures)
    for number, line in enumerate(run.read_lines(EVENTS_FILE)):
        kind = str(line.get("kind", "event"))
        rest = ", ".join(f"{key}={value}" for key, value in line.items() if key not in ("kind", "time"))
        worrying = any(word in kind for word in _WORRYING)
        yield TuningEvent(
            f"ftevent-{job_id}-run-{number:06d}",
            int(line.get("time") or begun),
            "warn" if worrying else "info",
            f"{kind.replace('_', ' ')}: {rest}" if rest else kind.replace("_", " "),
        )


def run_checkpoints(run: RunDir, job_id: str) -> list[TuningCheckpoint]:
    """Those that are there, the newest first."""
    lines = {int(line["step"]) + 1: line for line in run.read_lines(METRICS_FILE)}
    found = []
    for step in reversed(checkpoint_steps(run)):
        written = _written(run, f"{checkpoint_name(step)}/{MANIFEST}")
        if written is not None:  # else its writer died before the commit
            name = checkpoint_id(run.name, step)
            metrics = _figures(lines.get(step, {"step": step - 1}))
            found.append(TuningCheckpoint(f"ftckpt-{job_id}-{step:06d}", step, written, name, metrics))
    return found


def _figures(line: Mapping[str, Any]) -> dict[str, float]:
    """A step's figures in OpenAI's words, as far as it has words for them."""
    figures = {shown: float(line[key]) for key, shown in _FIGURES.items() if isinstance(line.get(key), int | float)}
    return {"step": int(line["step"]) + 1, **figures}


def _written(run: RunDir, name: str) -> int | None:
    info = run.filesystem.get_file_info(run.full_path(name))
    return int(info.mtime.timestamp()) if info.type == fs.FileType.File and info.mtime is not None else None
