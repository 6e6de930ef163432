"""Fine-tuning jobs over a Ray cluster's job server and the run folders of its jobs.

It keeps nothing between two calls: the config that a request stands for is made of the request, and what is told of a
job is read from its run folder.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Literal, TypeVar

from pyarrow import fs
from pydantic import ValidationError

from mmrl_ray.config import Config
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.sections import DataSection, RunSection
from mmrl_ray.config.serving import FineTuningSection, RecipeSection, ServingSection
from mmrl_ray.errors import ConfigError, OverloadedError, RunError, UnknownFileError, UnknownJobError
from mmrl_ray.jobs.client import JobsClient, own_address, own_ray
from mmrl_ray.jobs.records import HTTP_PREFIX, ID, Job, Status, new_http_id
from mmrl_ray.jobs.submit import note_job, python_for, remembered, submit_run
from mmrl_ray.run_records.rollout_log import rollouts_name
from mmrl_ray.run_records.run_dir import MANIFEST, RunDir, checkpoint_id, checkpoint_name, checkpoint_steps
from mmrl_ray.run_records.step_log import EVENTS, METRICS_FILE
from mmrl_ray.serving.fine_tuning_types import CheckpointCard, EventCard
from mmrl_ray.serving.protocols import ResultFile, TuningJob, TuningOrder, TuningStatus

logger = logging.getLogger(__name__)

_FILE_ID = re.compile(rf"file-({ID.pattern})-([a-z]+\.[a-z]+)")
"""Of a job's result file: the job's id without its prefix, and the name in the run's folder."""
_MARK_CHARS = 8
_STATUSES: dict[Status, TuningStatus] = {
    "pending": "queued",
    "running": "running",
    "succeeded": "succeeded",
    "failed": "failed",
    "stopped": "cancelled",
}

T = TypeVar("T")
RESULTS = ("summary.json", "report.html", METRICS_FILE)
"""Files of a run that are named as a job's results, where they are there."""
_FIGURES = {"loss": "train_loss", "reward/mean": "reward_mean", "kl": "kl", "entropy": "entropy", "lr": "lr"}
_WORRYING = ("lost", "died", "dead", "damaged", "failed", "replaced", "quarantined", "timeout", "hung")
"""Parts of the kinds of events that one had better look at."""


class RayJobService:
    """The jobs of one Ray's job server, for the gateway, which calls it in threads: all of it waits for others.

    Raises (every method): `UnknownJobError` no such job; `JobServerError` the cluster's job server is out of reach;
    `JobError` it refuses.
    """

    def __init__(self, settings: ServingSection) -> None:
        """Looks at the recipes; the job server is looked for when the first request comes.

        Raises:
            ConfigError: a recipe is wrong, or there is no `fine_tuning` section.
        """
        allowed, root = settings.fine_tuning, settings.adapters_root
        if allowed is None:
            raise ConfigError("jobs need serving.fine_tuning, which says what may be trained")
        recipe_configs(allowed)
        self._allowed = allowed
        self._root = str(allowed.root or root)
        self._client: JobsClient | None = None

    def create(self, order: TuningOrder) -> TuningJob:
        """Begins a job.

        Raises:
            ConfigError: the order does not fit the recipe.
            DataError: the dataset cannot be read.
            OverloadedError: too many jobs are under way.
        """
        active = sum(not job.is_over for job in self._jobs())
        if active >= self._allowed.max_active:
            raise OverloadedError(f"{active} jobs are under way, the most there may be: wait for one, or cancel it")
        id = new_http_id()
        run = run_name(order, id[-_MARK_CHARS:])
        cfg = compose(self._allowed, self._root, run, order, _rows)
        python = python_for(self._server, self._allowed.python)
        joined = None if self._allowed.address else own_ray()
        submit_run(self._server, cfg, python=python, id=id, request=asdict(order), ray_address=joined)
        job = self._server.get(id)
        try:
            note_job(self._root, job)
        except RunError as error:  # it is under way all the same
            logger.warning("job %s will be forgotten if this server is killed: %s", id, error)
        return _told(job)

    def get(self, id: str) -> TuningJob:
        """One job."""
        return _told(self._job(id))

    def jobs(self) -> list[TuningJob]:
        """All of them, the newest first."""
        return [_told(job) for job in self._jobs()]

    def cancel(self, id: str) -> TuningJob:
        """Asks a job to stop; it finishes its step first."""
        job = self._job(id)
        if not job.is_over:
            self._server.stop(id)
        return _told(self._server.get(id))

    def events(self, id: str) -> list[EventCard]:
        """What a job has to tell, the newest first; of one second the later told first."""
        job = self._job(id)
        run = open_run(job.facts.location)
        created = _event(f"{id}-created", int(job.created), "info", f"Created fine-tuning job: {id}")
        told = [created, *(run_events(run, id, int(job.created)) if run is not None else ()), *_last(job)]
        numbered = sorted(enumerate(told), key=lambda item: (item[1].created_at, item[0]))
        return [event for _, event in reversed(numbered)]

    def checkpoints(self, id: str) -> list[CheckpointCard]:
        """A job's checkpoints that are there, the newest first."""
        run = open_run(self._job(id).facts.location)
        return [] if run is None else run_checkpoints(run, id)

    def result(self, file_id: str) -> ResultFile:
        """One of a job's result files.

        Raises:
            UnknownFileError: there is no such file.
        """
        found: ResultFile | None = None
        if (parts := _FILE_ID.fullmatch(file_id)) is not None:
            for id in (HTTP_PREFIX + parts[1], parts[1]):  # of a resumed job the user may have chosen the id
                with suppress(UnknownJobError):
                    run = open_run(self._job(id).facts.location)
                    found = None if run is None else result_file(run, parts[2])
                    break
        if found is None:
            raise UnknownFileError(f"there is no file {file_id[:64]!r}: a job names its own as result_files")
        return found

    @property
    def _server(self) -> JobsClient:
        if self._client is None:
            self._client = JobsClient(self._allowed.address or own_address())
        return self._client

    def _jobs(self) -> list[Job]:
        """Those that were asked for over HTTP."""
        known = [job for job in self._server.jobs() if job.facts.request]
        ids = {job.id for job in known}
        return known + [job for job in remembered(self._root) if job.facts.request and job.id not in ids]

    def _job(self, id: str) -> Job:
        job: Job | None = None
        if ID.fullmatch(id):
            try:
                job = self._server.get(id)
            except UnknownJobError:  # of a Ray before this one, maybe
                job = next((job for job in remembered(self._root) if job.id == id), None)
        if job is None or not job.facts.request:
            raise UnknownJobError(f"there is no fine-tuning job {id[:64]!r}: GET /v1/fine_tuning/jobs lists them")
        return job


def _rows(location: str) -> int:
    from mmrl_ray.data.shards import ParquetDataset

    return ParquetDataset(location).rows


def _told(job: Job) -> TuningJob:
    tokens: int | None = None
    files: tuple[str, ...] = ()
    if job.is_over:
        tokens = _of_run(job, trained_tokens)
        mark = job.id.removeprefix(HTTP_PREFIX)
        files = tuple(f"file-{mark}-{name}" for name in _of_run(job, results) or ())
    return TuningJob(
        id=job.id,
        order=TuningOrder(**job.facts.request),
        run=job.facts.run,
        status=_STATUSES[job.status],
        created_at=int(job.created),
        finished_at=int(job.ended) if job.is_over and job.ended is not None else None,
        error=job.reason if job.status == "failed" else None,
        trained_tokens=tokens,
        result_files=files,
    )


def _of_run(job: Job, read: Callable[[Any], T]) -> T | None:
    """What the run folder tells; None where it is not to be had: the job itself is known all the same."""
    try:
        run = open_run(job.facts.location)
        return None if run is None else read(run)
    except RunError:
        return None


def _last(job: Job) -> Iterator[EventCard]:
    messages: dict[Status, str] = {
        "succeeded": "The job has successfully completed",
        "failed": f"The job failed: {job.reason}",
        "stopped": "The job was cancelled",
    }
    if job.status in messages:
        level: Any = "error" if job.status == "failed" else "info"
        yield _event(f"{job.id}-end", int(job.ended or job.created), level, messages[job.status])


def _event(place: str, when: int, level: Literal["info", "warn", "error"], message: str) -> EventCard:
    return EventCard(id=f"ftevent-{place}", created_at=when, level=level, message=message)


def compose(allowed: FineTuningSection, root: str, run: str, order: TuningOrder, rows: Callable[[str], int]) -> Config:
    """The config of a job; nothing in it is a client's but what `TuningOrder` holds.

    Args:
        allowed: has the order's model and datasets.
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
    """One of `results`, whole; None where it is not there, a RunError where it cannot be read."""
    written = _written(run, name) if name in RESULTS else None
    return None if written is None else ResultFile(name, written, run.read_bytes(name))


def run_events(run: RunDir, job_id: str, begun: int) -> Iterator[EventCard]:
    """One for each step, and one for each thing that happened to the run; `begun` is when where nothing tells."""
    for line in run.read_lines(METRICS_FILE):
        step = int(line["step"]) + 1
        figures = _figures(line)
        shown = ", ".join(f"{name}={value:.4g}" for name, value in figures.items() if name != "step")
        when = _written(run, rollouts_name(step - 1)) or begun
        told = _event(f"{job_id}-step-{step:06d}", when, "info", f"Step {step}: {shown}")
        yield told.model_copy(update={"type": "metrics", "data": figures})
    for number, line in enumerate(run.read_lines(EVENTS)):
        kind = str(line.get("kind", "event"))
        rest = ", ".join(f"{key}={value}" for key, value in line.items() if key not in ("kind", "time"))
        worrying = any(word in kind for word in _WORRYING)
        what = kind.replace("_", " ")
        yield _event(
            f"{job_id}-run-{number:06d}",
            int(line.get("time") or begun),
            "warn" if worrying else "info",
            f"{what}: {rest}" if rest else what,
        )


def run_checkpoints(run: RunDir, job_id: str) -> list[CheckpointCard]:
    """A run's checkpoints that are there, the newest first."""
    lines = {int(line["step"]) + 1: line for line in run.read_lines(METRICS_FILE)}
    found = []
    for step in reversed(checkpoint_steps(run)):
        written = _written(run, f"{checkpoint_name(step)}/{MANIFEST}")
        if written is not None:  # else its writer died before the commit
            checkpoint = CheckpointCard(
                id=f"ftckpt-{job_id}-{step:06d}",
                created_at=written,
                fine_tuning_job_id=job_id,
                fine_tuned_model_checkpoint=checkpoint_id(run.name, step),
                step_number=step,
                metrics=_figures(lines.get(step, {"step": step - 1})),
            )
            found.append(checkpoint)
    return found


def _figures(line: Mapping[str, Any]) -> dict[str, float]:
    """A step's figures in OpenAI's words, as far as it has words for them."""
    figures = {shown: float(line[key]) for key, shown in _FIGURES.items() if isinstance(line.get(key), int | float)}
    return {"step": int(line["step"]) + 1, **figures}


def _written(run: RunDir, name: str) -> int | None:
    info = run.filesystem.get_file_info(run.full_path(name))
    return int(info.mtime.timestamp()) if info.type == fs.FileType.File and info.mtime is not None else None
