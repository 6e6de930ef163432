"""Passes that take the cores that nobody uses: how many threads they have, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.experience.carriers import Completion, SamplingParams
from mmrl_ray.policy import cpu
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.tiny import build_tiny_llava
from tests.support.tiny_models import WORDS, make_samples


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    sizes = {"image_size": 128, "patch_size": 8, "hidden": 384, "layers": 2, "heads": 6, "vision_hidden": 256}
    path = build_tiny_llava(tmp_path, vocabulary=[*WORDS, *(f"word{i}" for i in range(1900))], **sizes)
    return load_policy(ModelSection(path=str(path)), device="cpu")


def captions(policy: Policy, n: int) -> list[Completion]:
    """Of one picture at a time, as a lone client's are."""
    made: list[Completion] = []
    for i, prompt in enumerate(encode_prompts(policy, make_samples()[:2])):
        request = DecodeRequest(prompt, n, SamplingParams(max_new_tokens=8, seed=i))
        made += decode_groups(Decoder(policy), [request])[0].completions
    return made


def watch_products(monkeypatch: pytest.MonkeyPatch, threads: list[int]) -> None:
    """Notes how many threads each of oneDNN's has."""
    product = cpu._multiply

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return product(x, weight, bias)

    monkeypatch.setattr(cpu, "_multiply", watched)


@pytest.mark.parametrize("n", [1, 3])
def test_a_lone_request_takes_idle_cores_and_is_answered_the_same_bit_for_bit(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    expected = captions(policy, n)
    policy.acceleration.use_idle_cores(policy, 2)
    seen: list[int] = []
    watch_products(monkeypatch, seen)
    monkeypatch.setattr(cpu, "runnable", lambda: 1)  # this thread
    found = captions(policy, n)
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1, "nothing but products has them"
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.token_ids, b.token_ids)
        assert torch.equal(a.logprobs, b.logprobs)
    seen.clear()
    monkeypatch.setattr(cpu, "runnable", lambda: 4)
    captions(policy, n)
    assert set(seen) == {1}, "others want them"


def test_a_machine_that_stays_busy_is_left_alone_and_one_that_was_busy_for_a_moment_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = {"now": 0.0, "running": 1}
    monkeypatch.setattr(cpu.time, "monotonic", lambda: machine["now"])
    monkeypatch.setattr(cpu, "runnable", lambda: machine["running"])
    found: list[int] = []
    watch_products(monkeypatch, found)
    layer, idle = cpu.OneDnnLinear(512, 512), cpu.IdleCores(own=1, most=2, cores=2)
    for now, running in [(10.0, 1), (10.001, 2), (11.0, 2), (12.0, 1), (13.0, 3), (13.01, 3), (13.02, 1), (13.3, 1)]:
        machine.update(now=now, running=running)
        with idle.taken(), torch.no_grad():
            layer(torch.ones(1, 512))
    # The second one finds OpenMP's own thread, which has just been at work; the third is one moment of somebody else's.
    assert found == [2, 2, 1, 2, 1, 1, 1, 2]


def test_products_that_depend_on_their_threads_keep_to_their_own(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = cpu._multiply

    def split(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One thread more adds one rounding error more, where there is a single row."""
        return product(x, weight, bias) * (1 + 1e-6 * (torch.get_num_threads() - 1) * (x.numel() == x.shape[-1]))

    monkeypatch.setattr(cpu, "_multiply", split)
    monkeypatch.setattr(cpu, "runnable", lambda: 1)
    forward = policy.acceleration.forward
    policy.acceleration.use_idle_cores(policy, 2)
    assert policy.acceleration.forward is forward


def test_a_small_model_keeps_to_its_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "runnable", lambda: 1)
    small = load_policy(ModelSection(path=str(build_tiny_llava(tmp_path, vocabulary=WORDS))), device="cpu")
    forward = small.acceleration.forward
    small.acceleration.use_idle_cores(small, 8)
    assert small.acceleration.forward is forward
