"""Fine-tuning jobs: the config that a request stands for, and what a job's run folder tells about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pyarrow import fs
from pydantic import ValidationError

from mmrl_ray.config import Config
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.sections import DataSection, RunSection
from mmrl_ray.config.serving import FineTuningSection, RecipeSection
from mmrl_ray.errors import ConfigError, RunError
from mmrl_ray.learner.checkpoints import checkpoint_name, checkpoint_steps
from mmrl_ray.policy.lora.pool import checkpoint_id
from mmrl_ray.run_records.recorder import rollouts_name
from mmrl_ray.run_records.run_dir import MANIFEST, RunDir
from mmrl_ray.run_records.step_log import METRICS_FILE
from mmrl_ray.serving.protocols import ResultFile, TuningCheckpoint, TuningEvent, TuningOrder

EVENTS_FILE = "events.jsonl"
RESULTS = ("summary.json", "report.html", METRICS_FILE)
"""Files of a run that are named as a job's results, where they are there."""
_FIGURES = {"loss": "train_loss", "reward/mean": "reward_mean", "kl": "kl", "entropy": "entropy", "lr": "lr"}
_WORRYING = ("lost", "died", "dead", "damaged", "failed", "replaced", "quarantined", "timeout", "hung")
"""Parts of the kinds of events that one had better look at."""


def compose(allowed: FineTuningSection, root: str, run: str, order: TuningOrder, rows: Callable[[str], int]) -> Config:
    """The config of a job; nothing in it is a client's but what `TuningOrder` holds.

    Args:
        allowed: has the order's model and datasets.
        root: where runs lie.
        run: its name.
        order: what the client asked.
        rows: of the dataset at a location.

    Raises:
        ConfigError: more steps than allowed, or numbers that do not fit the recipe.
        DataError: the dataset cannot be read.
    """
    recipe = allowed.models[order.model]
    train = allowed.datasets[order.training_file]
    learner = _learner(recipe.learner, order, lambda: rows(train))
    if learner["steps"] > allowed.max_steps:
        raise ConfigError(
            f"the job would take {learner['steps']:,} steps, and {allowed.max_steps:,} are the most: ask for fewer "
            "epochs or steps, or for larger batches"
        )
    held_out = allowed.datasets[order.validation_file] if order.validation_file is not None else None
    data = DataSection(train=train, eval=held_out, prompt=recipe.prompt)
    return _whole(recipe, RunSection(name=run, seed=order.seed, root=root), data, learner)


def recipe_configs(allowed: FineTuningSection) -> list[Config]:
    """A whole config of each recipe, its run and data made up: finds out at start what every job of it would fail on.

    Raises:
        ConfigError: its sections do not fit each other.
    """
    found = []
    for name, recipe in allowed.models.items():
        try:
            run, data = RunSection(name="check"), DataSection(train="check")
            found.append(_whole(recipe, run, data, recipe.learner.model_dump()))
        except ConfigError as error:
            raise ConfigError(f"serving.fine_tuning.models.{name}: {error}") from error
    return found


def run_name(order: TuningOrder, mark: str) -> str:
    """What the run and its result are called: an adapter's id, so it is short and no path."""
    return f"{(order.suffix or order.model).replace('/', '-')[:40]}-{mark}"


def _learner(recipe: LearnerSection, order: TuningOrder, rows: Callable[[], int]) -> dict[str, Any]:
    groups = order.batch_size or recipe.groups_per_step
    scale = order.lr_multiplier or 1.0
    steps = order.steps or recipe.steps
    if order.epochs is not None:
        steps = max(1, math.ceil(order.epochs * rows() / groups))
    chosen = {"steps": steps, "groups_per_step": groups, "lr": recipe.lr * scale, "lr_min": recipe.lr_min * scale}
    return recipe.model_dump() | chosen


def _whole(recipe: RecipeSection, run: RunSection, data: DataSection, learner: dict[str, Any]) -> Config:
    try:
        return Config(
            run=run,
            model=recipe.model,
            data=data,
            algorithm=recipe.algorithm,
            sft=recipe.sft,
            rollout=recipe.rollout,
            reward=recipe.reward,
            learner=LearnerSection.model_validate(learner),
            resources=recipe.resources,
        )
    except ValidationError as error:
        messages = [each["msg"].removeprefix("Value error, ") for each in error.errors(include_url=False)]
        raise ConfigError("; ".join(" ".join(message.split()) for message in messages)) from error


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
