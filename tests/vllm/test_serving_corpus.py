"""The corpus of bad requests against a gateway with vLLM behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mmrl_ray.policy.generation.vllm.decoder import VllmServer
from mmrl_ray.policy.lora.pool import AdapterPool
from mmrl_ray.serving.adapters import AdapterFolders
from mmrl_ray.serving.engine import Engine
from tests.unit.serving.test_corpus import (  # noqa: F401
    _no_network,
    caption,
    engine_of,
    gateway,
    runs,
    test_an_adapter_that_must_not_be_loaded,
    test_gets_its_4xx_and_the_server_goes_on,
    test_odd_pictures_are_captioned,
    test_what_clients_really_send_is_answered,
    test_what_the_cases_are_changes_of_is_answered,
)
from tests.vllm.conftest import RANK


@pytest.fixture(scope="module")
def model_folder(base: Path) -> Path:
    return base


@pytest.fixture(scope="module")
def engine(server: VllmServer, runs: Path) -> Iterator[Engine]:  # noqa: F811
    pool = AdapterPool(server.policy, AdapterFolders({}, [str(runs)]), max_adapters=2, max_rank=RANK, host=server)
    made = engine_of(server.policy, pool, vllm=server)
    yield made
    made.close()
    for name in [*server.adapters]:
        server.take_off(name)
