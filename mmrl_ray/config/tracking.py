"""`tracking:` where figures, pictures and results of a run go while it runs, beside its folder.

The short form is a list: `tracking: [tensorboard, wandb]` is `tracking: {to: [tensorboard, wandb]}`.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema

from mmrl_ray.config.sections import Section, refuse

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Those of this project; `mmrl_ray/tracking/registry.py` knows their classes."""
_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_SECRET = re.compile(r"(api_?key|token|secret|password)$", re.IGNORECASE)
_PASSWORD = "{}: holds a password, and a config is written into the run folder: set {} in the environment instead"


class WandbSection(Section):
    """Weights & Biases. The key comes from `wandb login` or `WANDB_API_KEY`, never from a config."""

    entity: str | None = None
    """User or team; the account's default otherwise."""
    group: str | None = None
    """Runs of one group stand together."""
    tags: list[str] = []
    """Of the run."""
    mode: Literal["online", "offline"] | None = None
    """By default `WANDB_MODE`, or online. Offline, all of it lies in the run folder for `wandb sync`."""


class MlflowSection(Section):
    """MLflow. User and password come from `MLFLOW_TRACKING_USERNAME` and `…_PASSWORD`, never from a config."""

    uri: str | None = None
    """Server, `sqlite:///FILE` or folder; by default `MLFLOW_TRACKING_URI`, or `sqlite:///mlflow.db` where the run is
    started."""


class TrackioSection(Section):
    """Trackio. What is written lies in `TRACKIO_DIR`, by default in Hugging Face's cache."""

    space: str | None = None
    """A Space on the Hub, `owner/name`, which gets all of it; needs a token (`hf auth login`)."""


class TrackingSection(Section):
    """Where figures, pictures and results go while the run runs. A tracker that fails is an event, and ends no run."""

    to: list[str] = ["tensorboard"]
    """Any of tensorboard, wandb, mlflow, trackio, and `module:Class` of your own; none in an empty list."""
    project: str = Field("mmrl", min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")
    """Project (W&B, Trackio) or experiment (MLflow) that the run stands in."""
    samples_every: int | None = Field(20, ge=1)
    """Steps from one look at pictures to the next: the best and the worst caption of some, and the rewards of the step
    as histograms. Null: never."""
    fixed_pictures: int = Field(4, ge=0, le=32)
    """The first of the held-out split (or of training without one), captioned anew each time, so that they compare."""
    fresh_pictures: int = Field(4, ge=0, le=32)
    """Of the step itself: those with its best and its worst caption, then the first ones. They cost no sampling."""
    table_rows: int = Field(32, ge=0, le=1000)
    """Captions of an evaluation that are sent with their pictures."""
    artifacts: bool = True
    """Send adapter and report when the run ends."""
    timeout_s: float = Field(60.0, gt=0)
    """For a tracker to take what it is given (ten times that for an artifact); then its process is ended and started
    again."""
    finish_s: float = Field(120.0, ge=0)
    """That the end of a run waits for trackers that are behind."""
    wandb: WandbSection = WandbSection()
    """Weights & Biases."""
    mlflow: MlflowSection = MlflowSection()
    """MLflow."""
    trackio: TrackioSection = TrackioSection()
    """Trackio."""
    own: dict[str, Any] = {}
    """Keyword arguments of your own classes. They are written into the run folder: no secrets."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return written_out(value)

    @field_validator("to")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        unknown = [name for name in names if name not in TRACKERS and not _OWN.fullmatch(name)]
        if unknown:
            near = difflib.get_close_matches(unknown[0].lower(), TRACKERS, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            there = f"there are {', '.join(TRACKERS)}, and module:Class of your own"
            raise ValueError(f"{unknown[0]!r} is no tracker{hint or f'; {there}'}")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice} stands there twice: write it once")
        return names

    @model_validator(mode="after")
    def _no_passwords(self) -> Self:
        uri = self.mlflow.uri
        remedy = "MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD,"
        unread = bool(self.own) and not any(name not in TRACKERS for name in self.to)
        refuse(
            {
                _PASSWORD.format("mlflow.uri", remedy): uri is not None and urlsplit(uri).password is not None,
                "own= is read by trackers of your own alone: name one in `to`, as module:Class": unread,
                **{
                    f"own={{{name}: …}} looks like a secret, and a config is written into the run folder: have your "
                    "class read it from the environment": _SECRET.search(name) is not None
                    for name in self.own
                },
            }
        )
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The section, or its short form."""
        whole = handler.resolve_ref_schema(handler(core))
        return {"anyOf": [whole, {"type": "array", "items": {"type": "string"}}]}


def written_out(value: Any) -> Any:
    """A `tracking:` that may be in its short form (a list, or one name), as the section that it is short for."""
    if isinstance(value, str):
        return {"to": [value]}
    return {"to": value} if isinstance(value, list) else value
