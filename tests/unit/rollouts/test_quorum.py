from __future__ import annotations

import pytest

from mmrl_ray.errors import RolloutError
from mmrl_ray.rollouts.pool_settings import PoolSettings
from mmrl_ray.rollouts.quorum import Quorum

SETTINGS = PoolSettings(workers=3, min_workers=2, worker_deadline_s=10.0)


def test_too_few_for_too_long_is_an_error_that_names_the_last_loss() -> None:
    quorum = Quorum(SETTINGS)
    for now, ready in ((0.0, 3), (5.0, 1), (15.0, 1), (15.5, 2), (16.0, 1), (26.0, 1)):
        quorum.look(ready, 3, now, "worker-1: died")
    with pytest.raises(RolloutError, match=r"1 of at least 2 .* for 10 s; last loss: worker-1: died; .*CPU: 1"):
        quorum.look(1, 3, 26.1, "worker-1: died")


def test_a_run_that_is_still_starting_has_no_minimum_yet() -> None:
    quorum = Quorum(SETTINGS)
    for now in (0.0, 100.0, 200.0):
        quorum.look(1, 3, now, "")
    assert not quorum.complete
    quorum.look(2, 2, 201.0, "")  # resized in between
    assert quorum.complete
