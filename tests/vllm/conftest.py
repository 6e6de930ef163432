"""An interpreter with vLLM, and one engine for the tests of a model; everything is skipped where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from mmrl_ray.config.learner import EngineSection
from mmrl_ray.errors import ConfigError
from mmrl_ray.policy.generation.vllm.engine import VllmEngine, start_engine
from mmrl_ray.policy.generation.vllm.environment import program
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.vision import VisionCache
from tests.vllm.models import policy_of

SMALL: dict[str, Any] = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 64}
ARGS = {"max_num_batched_tokens": 1024, "max_loras": 3}
TIMEOUT_S = 120.0


@pytest.fixture(scope="session")
def python() -> str:
    try:
        return program(os.environ.get("MMRL_VLLM_PYTHON"))
    except ConfigError as error:
        pytest.skip(f"no vLLM here, and MMRL_VLLM_PYTHON names none: {error}")


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return policy_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine(policy: Policy, python: str) -> Iterator[VllmEngine]:
    made = started(policy, python)
    yield made
    made.close()


def started(policy: Policy, python: str, args: Mapping[str, Any] = {}, **section: Any) -> VllmEngine:
    """As a rollout worker has it, but for what `args` and `section` say of vLLM's arguments."""
    cfg = EngineSection(kind="vllm", python=python, start_timeout_s=300.0, args={**ARGS, **args}, **SMALL, **section)
    cache = VisionCache(1 << 24)
    return start_engine(policy, cfg, cache, revision=None, threads=1, timeout_s=TIMEOUT_S, embeds=True)
