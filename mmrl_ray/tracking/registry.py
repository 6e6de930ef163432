"""The trackers of this project, and how a name in a config becomes one of them or a user's own class.

A new one is a file in this folder and a line in `KNOWN`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmrl_ray.config.tracking import TrackingSection
from mmrl_ray.errors import TrackerError, first_line, raised_at
from mmrl_ray.own_code import find_class
from mmrl_ray.tracking.base import About, Tracker


@dataclass(frozen=True, slots=True)
class Known:
    """A tracker of this project."""

    path: str
    """Its class, `module:Class`."""
    needs: tuple[str, ...]
    """Modules of its library."""
    extra: str
    """What installs them; empty where they are always there."""


KNOWN: dict[str, Known] = {
    "tensorboard": Known("mmrl_ray.tracking.tensorboard:TensorBoard", ("tensorboard",), ""),
    "wandb": Known("mmrl_ray.tracking.wandb:Wandb", ("wandb",), "wandb"),
    "mlflow": Known("mmrl_ray.tracking.mlflow:Mlflow", ("mlflow", "sqlalchemy", "alembic"), "mlflow"),
    "trackio": Known("mmrl_ray.tracking.trackio:Trackio", ("trackio",), "trackio"),
}


def options_of(section: TrackingSection, name: str) -> Mapping[str, Any]:
    """Keyword arguments of a tracker's class."""
    if name not in KNOWN:
        return section.own
    found = getattr(section, name, None)
    return {} if found is None else found.model_dump()


def make(name: str, about: About, options: Mapping[str, Any]) -> Tracker:
    """The tracker of that name. In its own process, which has imported nothing of it yet.

    Raises:
        TrackerError: it is not installed, cannot be imported, or does not take these options.
    """
    known = KNOWN.get(name)
    if known is None:
        return _own(name, about, options)
    for module in known.needs:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise TrackerError(not_installed(name, error)) from error
    module, _, kind = known.path.partition(":")
    made: Tracker = getattr(importlib.import_module(module), kind)(about, **options)
    return made


def not_installed(name: str, error: ImportError) -> str:
    """What to do about a library that is not there, or does not load."""
    extra = KNOWN[name].extra
    remedy = f"pip install 'mmrl_ray[{extra}]'" if extra else "install mmrl_ray anew"
    is_missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in KNOWN[name].needs
    why = f"{error.name} is not installed" if is_missing else f"it cannot be imported ({first_line(error)})"
    return f"tracking: {name}: {why}: {remedy}, or take it out of `tracking`"


def _own(path: str, about: About, options: Mapping[str, Any]) -> Tracker:
    found = find_class(path, Tracker, what="tracking:", error=TrackerError)
    try:
        return found(about, **options)
    except TypeError as error:
        raise TrackerError(
            f"tracking: {path} cannot be made with tracking.own={sorted(options)} ({first_line(error)}"
            f"{raised_at(error, without=lambda file: file == __file__)})"
        ) from error
