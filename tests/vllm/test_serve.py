"""`mmrl serve` with vLLM: the official client, a new version under load, and an engine that is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from tests.integration.serving.conftest import Server, make_run, serving, wait_for
from tests.integration.serving.test_serve import (  # noqa: F401
    Load,
    test_a_new_version_comes_on_under_load_and_no_answer_mixes_two,
    test_errors_have_their_types_through_all_processes,
    test_the_official_client_gets_what_transformers_generates,
    test_what_it_counts_reaches_prometheus_through_ray,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, python: str) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    engine = f"{{kind: vllm, python: {python}, enforce_eager: true}}"
    sets = (f"serving.policy.engine={engine}", "serving.max_adapters=2", "serving.max_rank=16", "reward=null")
    with serving(folder, make_run(folder, hidden=64), *sets) as made:
        yield made


def engines(server: Server) -> list[int]:
    """Processes that have the model: the workers of vLLM's, below replicas of the policy."""
    found = []
    for replica in server.pids("policy"):
        with suppress(psutil.Error):  # one that is just leaving
            for child in psutil.Process(replica).children(recursive=True):
                if "mmrl_ray.policy.generation.vllm.child:work" in child.cmdline() and not child.children():
                    found.append(child.pid)
    return found


def test_an_engine_that_is_killed_costs_no_answer(server: Server) -> None:
    with Load(server, 3) as load:
        wait_for(lambda: len(load.answers) > 6, "answers")
        (victim,) = engines(server)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: engines(server) not in ([], [victim]), "a new engine", 120)
        then = len(load.answers)
        wait_for(lambda: len(load.answers) > then + 20, "answers afterwards", 120)
    assert load.errors == []
    assert {version for _, version, _ in load.answers} == {f"tiny@{server.made.step}"}
