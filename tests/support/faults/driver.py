"""`mmrl`, whose runs fail when they are told to: `python -m tests.support.faults.driver train …`."""

from __future__ import annotations

from mmrl_ray import cli
from mmrl_ray.learner import group
from mmrl_ray.training import train
from tests.support.faults.inside import FaultyFactory, faulty_train_loop


def prepared() -> None:
    train.PolicyEngineFactory = FaultyFactory  # type: ignore[assignment, misc]
    group.train_loop = faulty_train_loop


def main() -> None:
    prepared()
    cli.app()


if __name__ == "__main__":
    prepared()
    cli.main()
