"""`resources:`: what placement promises about GPUs."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mmrl_ray.config.sections import ResourcesSection


def resources(placement: str, learner: float, rollout: float) -> ResourcesSection:
    value: dict[str, Any] = {"placement": placement, "learner": {"gpus": learner}, "rollout": {"gpus": rollout}}
    return ResourcesSection.model_validate(value)


@pytest.mark.parametrize(("placement", "learner", "rollout"), [("shared", 0.5, 0.5), ("shared", 1, 0), ("split", 1, 2)])
def test_gpus_that_fit_the_placement(placement: str, learner: float, rollout: float) -> None:
    assert resources(placement, learner, rollout).placement == placement


@pytest.mark.parametrize(
    ("placement", "learner", "rollout", "message"),
    [("shared", 1, 1, "add up to more than 1"), ("split", 0.5, 1, "whole GPUs"), ("split", 1, 1.5, "whole GPUs")],
)
def test_gpus_that_do_not(placement: str, learner: float, rollout: float, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        resources(placement, learner, rollout)
