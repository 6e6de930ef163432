"""An interpreter with vLLM, and one engine for the tests of a model; everything is skipped where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.config.engine import EngineSection
from mmrl_ray.errors import ConfigError
from mmrl_ray.policy.generation.vllm.decoder import VllmServer, start_server
from mmrl_ray.policy.generation.vllm.engine import VllmEngine, start_engine
from mmrl_ray.policy.generation.vllm.environment import program
from mmrl_ray.policy.load import load_skeleton
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.vision import VisionCache
from tests.support.tiny_models import section_of
from tests.vllm.models import llava_folder, policy_of

SMALL: dict[str, Any] = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 64}
ARGS = {"max_num_batched_tokens": 1024}
TIMEOUT_S = 120.0
PLACES, RANK, SERVED_S = 3, 64, 60.0
"""Of the served model: adapters at a time and their rank; and for each answer of its process."""


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
    asked = {"args": {**ARGS, "max_loras": 3, **args}, **SMALL, **section}
    cfg = EngineSection(kind="vllm", python=python, start_timeout_s=300.0, **asked)
    cache = VisionCache(1 << 24)
    return start_engine(policy, cfg, cache, revision=None, threads=1, timeout_s=TIMEOUT_S, embeds=True)


# -- served ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return llava_folder(tmp_path_factory.mktemp("base") / "llava", quiet=True)


@pytest.fixture(scope="session")
def server(base: Path, python: str) -> Iterator[VllmServer]:
    """One for all engines, which would end it with themselves; one of them at a time."""
    made = begun(base, python)
    end = made.close
    made.close = lambda: None  # type: ignore[method-assign]
    yield made
    end()


def begun(base: Path, python: str, **settings: Any) -> VllmServer:
    cfg = EngineSection(kind="vllm", python=python, args=ARGS, **{**SMALL, "max_model_len": 512})
    values = {"max_rows": 32, "adapters": (PLACES, RANK), "threads": 1, "timeout_s": SERVED_S, **settings}
    return start_server(endless(load_skeleton(section_of("llava", base))), cfg, **values)


def endless(policy: Policy) -> Policy:
    """As the tests of the local engine have it: nothing but the last word ends an answer."""
    policy.eos_token_ids = (policy.vocab_size - 1,)
    return policy
