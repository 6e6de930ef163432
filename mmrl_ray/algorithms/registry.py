"""The families of this package, and how a name in a config becomes one of them or a user's own class.

A new one is a file in this folder and a line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from functools import cache
from typing import TYPE_CHECKING, Any

from mmrl_ray.algorithms.base import Algorithm, Panel
from mmrl_ray.algorithms.distill import Distill
from mmrl_ray.algorithms.dpo import Dpo
from mmrl_ray.algorithms.dqn.algorithm import ValueBased
from mmrl_ray.algorithms.ilql import Ilql
from mmrl_ray.algorithms.policy_gradient import PolicyGradient
from mmrl_ray.algorithms.ppo import Ppo
from mmrl_ray.algorithms.raft import Raft
from mmrl_ray.algorithms.sapo import Sapo
from mmrl_ray.errors import ConfigError
from mmrl_ray.own_code import find_class

if TYPE_CHECKING:
    from mmrl_ray.config.learner import LearnerSection

FAMILIES: tuple[type[Algorithm], ...] = (PolicyGradient, Dpo, Ilql, Raft, Sapo, Ppo, Distill, ValueBased)
"""In the order in which messages name them."""

PRESETS: dict[str, dict[str, Any]] = {
    name: dict(preset) for family in FAMILIES if family.losses for name, preset in family.presets.items()
}
"""`algorithm:` names of what learns by `learner:` keys, and the defaults that each names."""
ALGORITHMS: tuple[str, ...] = tuple(name for family in FAMILIES for name in family.presets)
"""All that `algorithm:` may say, beside a class of a user's own."""
LOSSES: tuple[str, ...] = tuple(loss for family in FAMILIES for loss in family.losses)
"""The same of `learner.loss`."""


def family_of_loss(loss: str) -> type[Algorithm]:
    """The family whose objective it is.

    Raises:
        ConfigError: there is none of that name, or no such class.
    """
    for family in FAMILIES:
        if loss in family.losses:
            return family
    return own_class(loss)


def family_of_algorithm(name: str, learner: LearnerSection) -> Algorithm:
    """The family of a whole config: one without a loss is chosen by `algorithm:`, every other one by `learner.loss`."""
    for family in FAMILIES:
        if name in family.presets and not family.losses:
            return family(learner)
    return family_of_loss(learner.loss)(learner)


def preset_of(algorithm: str) -> Mapping[str, Any] | None:
    """Defaults of `learner:` keys; None for a name that says nothing of them.

    Raises:
        ConfigError: `module:Class` is no algorithm.
    """
    if is_path(algorithm):
        return {**_first_preset(own_class(algorithm)), "loss": algorithm}
    return PRESETS.get(algorithm)


def readers_of(source: str) -> str:
    """The losses that learn from such samples, in words."""
    return " or ".join(loss for family in FAMILIES if family.samples == source for loss in family.losses)


def losses_with_teacher() -> str:
    """The losses that read `teacher:`, in words."""
    return " or ".join(loss for family in FAMILIES if family.has_teacher for loss in family.losses)


def is_path(name: str) -> bool:
    """Whether it names a class of a user's own."""
    return ":" in name


@cache
def own_class(path: str) -> type[Algorithm]:
    """The class behind `module:Class`, looked for in the working directory, too, as a user's reward functions are.

    Raises:
        ConfigError: it cannot be imported, or is no algorithm.
    """
    found = find_class(path, Algorithm, what="algorithm", error=ConfigError)
    if unknown := sorted(_first_preset(found).keys() - _learner_keys()):
        raise ConfigError(f"algorithm {path}: its preset names {unknown[0]!r}, which is no key of learner")
    if found.samples == "environment":
        raise ConfigError(f"algorithm {path} learns from an environment, for which a class of your own has no run")
    return found


def _first_preset(family: type[Algorithm]) -> Mapping[str, Any]:
    return next(iter(family.presets.values()), {})


def _learner_keys() -> Set[str]:
    from mmrl_ray.config.learner import LearnerSection

    return LearnerSection.model_fields.keys()


def own_panels(config: Any) -> tuple[Panel, ...]:
    """Charts of a user's own algorithm, by a config that may be anything; none where the class is not to be had."""
    learner = config.get("learner") if isinstance(config, dict) else None
    loss = learner.get("loss") if isinstance(learner, dict) else None
    try:
        return own_class(loss).panels if isinstance(loss, str) and is_path(loss) else ()
    except ConfigError:
        return ()


def sections(place: str) -> Iterator[type[Algorithm]]:
    """Families with keys of their own: below `learner`, or `top` for those that use no loss of it."""
    for family in FAMILIES:
        if family.section_name is not None and (place == "learner") == bool(family.losses):
            yield family
