"""A model in parts (`tensor_parallel_size`), what becomes of its processes, and engines that cannot start."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mmrl_ray.errors import AdapterError, ConfigError, ProcessError
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.generation.vllm.engine import VllmEngine
from mmrl_ray.policy.model import Policy
from tests.vllm.compare import BOUND, gap, load, long_samples, prepared, requests, says_what_generate_says
from tests.vllm.conftest import TIMEOUT_S, started
from tests.vllm.models import adapter_of, policy_of

SHARED = Path("/dev/shm")
BEFORE = {*os.listdir(SHARED)}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return policy_of("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def parted(policy: Policy, python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """Two processes have a half of each layer, on a machine whose temporary folder's name is too long for a socket; a
    test ends them."""
    folder = tmp_path_factory.mktemp("a-folder-of-a-cluster-" + 64 * "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        made = started(policy, python, tensor_parallel_size=2)
    assert not [*folder.glob("vllm_dist_*")], "the file that they met by is left"
    yield made
    made.close()


@pytest.fixture
def prompts(policy: Policy, parted: VllmEngine) -> list[EncodedPrompt]:
    return prepared(policy, parted, long_samples())


def segments() -> set[str]:
    """Shared memory that Python and vLLM's operators for CPUs have made for several processes, but what was there."""
    return {name for name in os.listdir(SHARED) if name.startswith(("psm_", "vllm_dist_"))} - BEFORE


def parts_of(owner: int) -> list[psutil.Process]:
    """The processes below the engine's own that have a part of the model."""
    below = psutil.Process(owner).children(recursive=True)
    return [each for each in below if "spawn_main" in " ".join(each.cmdline()) or "VLLM::" in each.name()]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_model_in_parts_is_the_same_policy_over_versions(
    policy: Policy, parted: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    for version in (0, 1, 2):
        load(policy, parted, version)
        says_what_generate_says(policy, parted, prompts)
        assert gap(policy, prompts, parted.generate(requests(prompts, seed=version))) < BOUND


def test_an_adapter_that_no_part_takes_leaves_their_answers_in_order(
    policy: Policy, parted: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    elsewhere = {name.replace("layers.0", "layers.9"): tensor for name, tensor in (adapter_of(policy, 2) or {}).items()}
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"version 41 .* no place for 7 of the adapter's 14 layers"):
            parted._process.ask("load", version=41, adapter=parted._config, tensors=elsewhere, timeout_s=TIMEOUT_S)
    for version in (3, 4):
        load(policy, parted, version)
        assert gap(policy, prompts, parted.generate(requests(prompts, seed=version))) < BOUND


def test_a_part_that_dies_is_an_error_and_leaves_nothing_behind(
    policy: Policy, parted: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    parts = parts_of(parted._process.facts["pid"])
    assert len(parts) == 2
    parts[1].kill()
    with pytest.raises(ProcessError):
        parted.generate(requests(prompts))
    parted.close()
    until(lambda: not any(part.is_running() for part in parts), "a part of the model is left")
    until(lambda: not segments(), f"shared memory is left: {segments()}")


def test_the_parts_end_with_a_worker_that_is_killed(policy: Policy, python: str) -> None:
    read, write = os.pipe()
    worker = os.fork()
    if worker == 0:
        engine = started(policy, python, tensor_parallel_size=2)
        os.write(write, str(engine._process.facts["pid"]).encode())
        signal.pause()
    engine_of_it = psutil.Process(int(os.read(read, 100)))
    processes = [engine_of_it, *parts_of(engine_of_it.pid)]
    assert len(processes) == 3
    assert segments()
    processes[1].send_signal(signal.SIGSTOP)  # one that hangs ends, too
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    until(lambda: not any(each.is_running() for each in processes), "a process of the engine is left")
    until(lambda: not segments(), f"shared memory is left: {segments()}")


def test_no_room_for_one_completion_says_what_to_set(policy: Policy, python: str) -> None:
    with pytest.raises(ConfigError, match=r"cache blocks.*gpu_memory_utilization.* or lower max_model_len"):
        started(policy, python, args={"kv_cache_memory_bytes": 1 << 14, "block_size": 32})
