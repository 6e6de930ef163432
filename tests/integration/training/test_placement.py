"""`mmrl train --dry-run --address`: the plan of a run held against a Ray that is there."""

from __future__ import annotations

from .conftest import Workplace


def test_the_plan_is_held_against_the_cluster(workplace: Workplace) -> None:
    address = workplace.environment["RAY_ADDRESS"]
    fits = workplace.config("fits", rollout={"workers": 2})
    output = workplace.mmrl("train", fits, "--dry-run", "--resume-or-start", "--address", address)
    assert "4 CPU, 0 GPU: learner 0, rollout 0, rollout 1" in output
    assert "Would stop the run" not in output

    large = workplace.config("large", resources={"learner": {"cpus": 3}, "rollout": {"cpus": 2}})
    output = workplace.mmrl("train", large, "--dry-run", "--address", address, code=1)
    assert "4 CPU, 0 GPU: learner 0" in output
    line = "1 of 1 rollout actors have no node, each asks for 2 CPU, 0 GPU; the 1 nodes have up to 4 CPU and 0 GPU each"
    assert f"error: {line}" in output
    assert "add room for 1 more, or lower resources.rollout" in output
    assert not workplace.runs.exists() or not {"fits", "large"} & {p.name for p in workplace.runs.iterdir()}
