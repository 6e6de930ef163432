"""From what a client asked to a whole config: the recipe of its model, its data, its few hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from mmrl_ray.config import Config
from mmrl_ray.config.data import DataSection
from mmrl_ray.config.fine_tuning import FineTuningSection, RecipeSection
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.run import RunSection
from mmrl_ray.errors import ConfigError
from mmrl_ray.serving.protocols import TuningOrder


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
