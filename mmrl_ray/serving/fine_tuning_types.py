"""OpenAI's fine-tuning jobs as far as they are served here: what comes in, and what goes out.

Reinforcement is the one method. The reward, the loss and all else are the recipe's that `model` names; a client sets
the hyperparameters below and nothing more.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from mmrl_ray.serving.openai import Reply, Strict
from mmrl_ray.serving.protocols import ResultFile, TuningJob, TuningOrder

_AUTO = "auto"


def _no_grader(value: Any) -> None:
    if value is not None:
        raise ValueError("the reward is that of the model's recipe: send no grader")


_AUTOMATIC = BeforeValidator(lambda value: None if value == _AUTO else value)
_TEXT = "a number, or `auto` for the recipe's own"


class Hyperparameters(Strict):
    """What a client may set; `auto` or nothing leaves it to the recipe."""

    n_epochs: Annotated[Annotated[int, Field(ge=1, le=10_000)] | None, _AUTOMATIC, Field(description=_TEXT)] = None
    """Passes over the training data."""
    steps: Annotated[Annotated[int, Field(ge=1, le=10**7)] | None, _AUTOMATIC, Field(description=_TEXT)] = None
    """Optimiser steps, in place of passes. Not OpenAI's."""
    batch_size: Annotated[Annotated[int, Field(ge=1, le=65_536)] | None, _AUTOMATIC, Field(description=_TEXT)] = None
    """Images a step."""
    learning_rate_multiplier: Annotated[
        Annotated[float, Field(gt=0, le=1000)] | None, _AUTOMATIC, Field(description=_TEXT)
    ] = None
    """Scales the recipe's learning rate."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.n_epochs is not None and self.steps is not None:
            raise ValueError("send n_epochs or steps, not both")
        return self


class Reinforcement(Strict):
    """The one method."""

    hyperparameters: Hyperparameters | None = None
    grader: Annotated[None, BeforeValidator(_no_grader)] = None
    """Always null: the reward is the recipe's."""


class Method(Strict):
    """How to train."""

    type: Literal["reinforcement"]
    reinforcement: Reinforcement | None = None


class FineTuningRequest(Strict):
    """`POST /v1/fine_tuning/jobs`."""

    model: Annotated[str, Field(max_length=64)]
    """Id of a recipe."""
    training_file: Annotated[str, Field(max_length=64)]
    """Id of a dataset."""
    validation_file: Annotated[str, Field(max_length=64)] | None = None
    """Id of a dataset that the result is evaluated on, before and after."""
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")] | None = None
    """Begins the name of the result."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Every random choice derives from it."""
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """The older place for those of `method`."""
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    """The client's own notes."""
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    """None are served."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.hyperparameters is not None and self._of_method is not None:
            raise ValueError("hyperparameters: send them here or in method.reinforcement, not in both")
        return self

    @property
    def _of_method(self) -> Hyperparameters | None:
        if self.method is None or self.method.reinforcement is None:
            return None
        return self.method.reinforcement.hyperparameters

    @property
    def order(self) -> TuningOrder:
        """What is asked for; a seed is drawn where there is none."""
        chosen = self._of_method or self.hyperparameters or Hyperparameters()
        return TuningOrder(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            suffix=self.suffix,
            seed=secrets.randbelow(2**31) if self.seed is None else self.seed,
            epochs=chosen.n_epochs,
            steps=chosen.steps,
            batch_size=chosen.batch_size,
            lr_multiplier=chosen.learning_rate_multiplier,
            metadata=self.metadata,
        )


class JobProblem(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobCard(Reply):
    """`fine_tuning.job`."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: None = None
    status: str
    model: str
    fine_tuned_model: str | None
    """Id of the adapter, once the job has succeeded."""
    organization_id: str = "mmrl_ray"
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    hyperparameters: dict[str, int | float | str]
    method: dict[str, Any]
    seed: int
    error: JobProblem | None
    metadata: dict[str, str] | None
    integrations: list[Any]

    @classmethod
    def of(cls, job: TuningJob) -> Self:
        """As OpenAI writes it."""
        order = job.order
        chosen = {
            "n_epochs": order.epochs or _AUTO,
            "batch_size": order.batch_size or _AUTO,
            "learning_rate_multiplier": order.lr_multiplier or _AUTO,
            **({"steps": order.steps} if order.steps is not None else {}),
        }
        return cls(
            id=job.id,
            created_at=job.created_at,
            finished_at=job.finished_at,
            status=job.status,
            model=order.model,
            fine_tuned_model=job.run if job.status == "succeeded" else None,
            training_file=order.training_file,
            validation_file=order.validation_file,
            result_files=list(job.result_files),
            trained_tokens=job.trained_tokens,
            hyperparameters=chosen,
            method={"type": "reinforcement", "reinforcement": {"hyperparameters": chosen, "grader": None}},
            seed=order.seed,
            error=None if job.error is None else JobProblem(code="job_failed", message=job.error, param=None),
            metadata=None if order.metadata is None else dict(order.metadata),
            integrations=[],
        )


class EventCard(BaseModel):
    """`fine_tuning.job.event`: something that a job has to tell."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None
    """Figures of a step."""


class CheckpointCard(BaseModel):
    """`fine_tuning.job.checkpoint`: a step that a job could go on from."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    """Of the run at that step."""
    step_number: int
    metrics: dict[str, float]


class FileCard(Reply):
    """`file`, of a job's result."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune-results"] = "fine-tune-results"
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, id: str, file: ResultFile) -> Self:
        """As OpenAI writes it."""
        return cls(id=id, bytes=len(file.data), created_at=file.created_at, filename=file.name)


class _Page(BaseModel):
    object: Literal["list"] = "list"
    has_more: bool


class JobPage(_Page):
    """Some of the jobs."""

    data: list[JobCard]


class EventPage(_Page):
    """Some of a job's events."""

    data: list[EventCard]


class CheckpointPage(_Page):
    """Some of a job's checkpoints."""

    data: list[CheckpointCard]
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, cards: Sequence[CheckpointCard], has_more: bool) -> Self:
        """With the ids at both ends."""
        ends = (cards[0].id, cards[-1].id) if cards else (None, None)
        return cls(data=list(cards), has_more=has_more, first_id=ends[0], last_id=ends[1])
