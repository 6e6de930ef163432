"""`algorithm:` and `learner.loss` — names of algorithms, and the defaults of `learner:` keys that a name stands for.

What there is to choose from stands in rooms above this one, and is found by its name, as a user's own class is.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from mmrl_ray.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from mmrl_ray.config.sections import Section


def registry() -> ModuleType:
    """`mmrl_ray.algorithms.registry`."""
    return importlib.import_module("mmrl_ray.algorithms.registry")


def _one_of(names: tuple[str, ...], value: Any) -> Any:
    """A name among these, or a class of the user's own that is there."""
    found = registry()
    if isinstance(value, str) and found.is_path(value):
        try:
            found.own_class(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    elif value not in names:
        quoted = [f"'{name}'" for name in names]
        raise PydanticCustomError(
            "literal_error", "Input should be {expected}", {"expected": f"{', '.join(quoted[:-1])} or {quoted[-1]}"}
        )
    return value


def _schema(names: tuple[str, ...]) -> dict[str, Any]:
    return {"anyOf": [{"enum": list(names), "type": "string"}, {"pattern": "^[\\w.]+:\\w+$", "type": "string"}]}


_ALGORITHMS: tuple[str, ...] = registry().ALGORITHMS
_LOSSES: tuple[str, ...] = registry().LOSSES

if TYPE_CHECKING:
    Algorithm = str
    Loss = str
else:
    Algorithm = Annotated[
        str, BeforeValidator(lambda value: _one_of(_ALGORITHMS, value)), WithJsonSchema(_schema(_ALGORITHMS))
    ]
    Loss = Annotated[str, BeforeValidator(lambda value: _one_of(_LOSSES, value)), WithJsonSchema(_schema(_LOSSES))]


def section_fields(place: str, *, optional: bool = False) -> dict[str, Any]:
    """Fields for `create_model`: the sections of algorithms that stand at that place of a config."""
    found: dict[str, Any] = {}
    for family in registry().sections(place):
        kind: type[Section] = family.section
        name = family.section_name
        told = f"Of `loss: {family.losses[0]}`." if family.losses else f"The agent of `algorithm: {name}`."
        found[name] = (
            (kind | None, Field(None, description=told)) if optional else (kind, Field(kind(), description=told))
        )
    return found


def with_defaults(written: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`written` over `defaults`, section by section: writing `kl.estimator` leaves the preset's `kl.weight` alone."""
    merged: dict[str, Any] = {**defaults}
    for key, value in written.items():
        nested = isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
        merged[key] = with_defaults(value, defaults[key]) if nested else value
    return merged


def with_preset(config: Any) -> Any:
    """A config that is not validated yet, the defaults of its preset written into its `learner:`."""
    if not isinstance(config, dict) or not isinstance(config.get("learner"), dict):
        return config  # the ordinary validation says what is wrong
    algorithm = config.get("algorithm", "grpo")
    try:
        preset = registry().preset_of(algorithm) if isinstance(algorithm, str) else None
    except ConfigError:
        return config  # and here
    return config if preset is None else {**config, "learner": with_defaults(config["learner"], preset)}
