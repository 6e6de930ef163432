"""vLLM's engine against transformers' own `generate` and against the learner's log-probs."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.config import Config
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.errors import AdapterError, ConfigError, ContextLengthError, LearnerError, ModelError, ProcessError
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams, VisionFeatures
from mmrl_ray.learner.objective import SamplerGap
from mmrl_ray.planning.estimate import engine_memory
from mmrl_ray.policy.generation.base import DecodeRequest, GroupOutput
from mmrl_ray.policy.generation.vllm.engine import VllmEngine, start_engine
from mmrl_ray.policy.generation.vllm.exchange import collect, embeddings, submit
from mmrl_ray.policy.generation.vllm.process import check
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import add_adapter
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.memory import CACHE_BLOCK, model_shape
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import choose_path
from mmrl_ray.policy.prompts import check_context
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.policy.trial import generated_logprobs
from mmrl_ray.policy.vision import VisionCache, vision_features
from mmrl_ray.rollouts.scorer import Scorer
from tests.support.tiny_models import WORDS, image_bytes, make_samples
from tests.unit.policy.generation.test_decode_families import TOKENS, generated
from tests.vllm.compare import (
    BOUND,
    TEMPERATURE,
    gap,
    is_of_one_version,
    load,
    long_samples,
    prepared,
    requests,
    says_what_generate_says,
    wear,
)
from tests.vllm.conftest import TIMEOUT_S, started
from tests.vllm.models import RANK, adapter_of


@pytest.fixture(scope="module")
def coarse(policy: Policy, python: str) -> list[VllmEngine]:
    """One engine that computes otherwise; a test takes it out."""
    return [started(policy, python, dtype="bfloat16")]


@pytest.fixture
def prompts(policy: Policy, engine: VllmEngine) -> list[EncodedPrompt]:
    return prepared(policy, engine, long_samples())


def made_of(policy: Policy, engine: VllmEngine, asked: Sequence[DecodeRequest]) -> list[dict[str, torch.Tensor]]:
    """What travels of their pictures."""
    features = engine.features(asked)
    assert features is not None
    return [embeddings(policy, *each) for each in zip(asked, features, strict=True)]


def test_greedy_tokens_are_those_of_generate(policy: Policy, engine: VllmEngine, prompts: list[EncodedPrompt]) -> None:
    for version in (0, 1):
        load(policy, engine, version)
        says_what_generate_says(policy, engine, prompts)


def test_versions_swapped_while_groups_are_under_way_are_neither_stale_nor_mixed(
    policy: Policy, engine: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    process, under_way = engine._process, []
    versions = (11, 12, 13, 14)  # one more than there are places for
    for version in versions:  # the same prompts each time, so that the prefix cache has them of every version
        weights = adapter_of(policy, version) or {}
        process.ask("load", version=version, adapter=engine._config, tensors=weights, timeout_s=TIMEOUT_S)
        asked = requests(prompts, seed=version, tokens=24)
        tickets = submit(process, version, asked, made_of(policy, engine, asked), timeout_s=TIMEOUT_S)
        under_way.append((version, asked, tickets))
        if version > 11:
            process.ask("drop", version=version - 1, timeout_s=TIMEOUT_S)
    for version, asked, tickets in reversed(under_way):
        outputs = collect(policy, process, asked, tickets, timeout_s=TIMEOUT_S)
        is_of_one_version(policy, prompts, outputs, version, versions)
    with pytest.raises(ProcessError, match=r"version 12 is not loaded"):
        submit(process, 12, asked, made_of(policy, engine, asked), timeout_s=TIMEOUT_S)


def test_other_weights_under_an_old_number_are_not_answered_from_the_cache(
    policy: Policy, engine: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    for weights in (21, 22):
        engine.load(7, adapter_of(policy, weights))
        wear(policy, weights)
        assert gap(policy, prompts, engine.generate(requests(prompts))) < BOUND


def test_seeds_repeat_and_the_base_is_the_policy_without_adapter(
    policy: Policy, engine: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    load(policy, engine, 0)
    asked = requests(prompts, seed=3)
    beside_greedy = [replace(request, greedy_extra=True) for request in asked]  # which draw from no stream
    first, *others = (engine.generate(each) for each in (asked, asked, beside_greedy))
    rows = [[c.token_ids.tolist() for output in each for c in output.completions] for each in (first, *others)]
    assert rows[0] == rows[1] == rows[2]
    assert len({str(row) for row in rows[0]}) > len(prompts)  # those of a group differ
    assert gap(policy, prompts, first) < BOUND


def test_tokens_of_pictures_are_never_sampled(policy: Policy, engine: VllmEngine, prompts: list[EncodedPrompt]) -> None:
    load(policy, engine, 1)
    outputs = engine.generate(requests(prompts, n=24, tokens=24, temperature=2.0))
    sampled = {int(token) for output in outputs for c in output.completions for token in c.token_ids}
    assert not sampled & set(policy.image_token_ids)
    assert len(sampled) > policy.vocab_size // 2


def test_a_prompt_and_its_picture_are_computed_once_for_a_group(policy: Policy, engine: VllmEngine) -> None:
    (sample,) = long_samples(1)
    sample = replace(sample, images=(image_bytes(64, 64, seed=5),))
    (prompt,) = prepared(policy, engine, [sample])
    engine.load(31, adapter_of(policy, 31))
    engine.counters()
    engine.generate(requests([prompt], n=8))
    found = engine.counters()
    length = prompt.input_ids.numel()
    assert found["prefix_cache_queries"] == 8 * length
    # Whole blocks, of all but the first; a prompt's last token is computed in any case.
    assert found["prefix_cache_hits"] == 7 * ((length - 1) // CACHE_BLOCK) * CACHE_BLOCK > 0
    engine.load(32, adapter_of(policy, 32))
    hits, misses = engine._cache.hits, engine._cache.misses
    (output,) = engine.generate(requests([prompt], n=8))
    assert (engine._cache.hits - hits, engine._cache.misses - misses) == (1, 0)  # its features are of no version
    assert output.vision is not None  # whoever scores has no need of the tower, either


@pytest.mark.parametrize("policy", ["qwen2_5_vl"], indirect=True)
def test_pictures_go_as_such_where_vllm_is_to_have_a_tower(
    policy: Policy, engine: VllmEngine, prompts: list[EncodedPrompt], python: str
) -> None:
    pixels = started(policy, python, {"enable_mm_embeds": False})
    asked = [DecodeRequest(p, 2, SamplingParams(max_new_tokens=TOKENS), greedy_extra=True) for p in prompts]
    load(policy, engine, 1)
    pixels.load(1, adapter_of(policy, 1))
    outputs = pixels.generate(asked)
    for output, other, prompt in zip(outputs, engine.generate(asked), prompts, strict=True):
        assert output.greedy is not None
        assert other.greedy is not None
        assert output.vision is None  # the scorer makes them
        assert output.greedy.token_ids.tolist() == other.greedy.token_ids.tolist() == generated(policy, prompt)
        assert float((output.greedy.logprobs - other.greedy.logprobs).abs().max()) < BOUND
    found = pixels.counters()
    assert (found["mm_cache_queries"], found["mm_cache_hits"]) == (2 * len(prompts), len(prompts))
    pixels.close()


def test_features_of_a_wrong_shape_are_refused_before_they_travel(
    policy: Policy, engine: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    load(policy, engine, 1)
    (asked,) = requests(prompts[:1])
    right = vision_features(policy, prompts[:1])[0].tokens
    for wrong in (right[1:], right[:, :-1], right[None]):
        with pytest.raises(ModelError, match="vision features for a prompt of 1 pictures"):
            engine.generate([replace(asked, features=VisionFeatures(wrong))])
    assert gap(policy, prompts[:1], engine.generate([replace(asked, features=VisionFeatures(right))])) < BOUND


def test_greedy_log_probs_are_made_at_the_requests_temperature(
    policy: Policy, engine: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    """vLLM's are those of temperature 1."""
    load(policy, engine, 1)
    versions = VersionedPolicy(policy)
    scorer = Scorer(versions, VisionCache(1 << 24), temperature=TEMPERATURE)
    sampled = [replace(r, greedy_extra=True) for r in requests(prompts)]
    evaluated = [replace(r, n=1, sampling=replace(r.sampling, greedy=True)) for r in requests(prompts)]
    for asked in (sampled, evaluated):
        outputs = engine.generate(asked)
        mended = scorer.with_greedy_logprobs(asked, outputs)
        for prompt, before, after in zip(prompts, outputs, mended, strict=True):
            row, old = after.greedy or after.completions[0], before.greedy or before.completions[0]
            expected = generated_logprobs(policy, prompt, row.token_ids[None], TEMPERATURE)[0]
            assert float((row.logprobs - expected).abs().max()) < BOUND < float((old.logprobs - expected).abs().max())
            if asked is sampled:
                assert after.completions == before.completions


@pytest.mark.parametrize("policy", ["llava"], indirect=True)
def test_a_sampler_that_is_another_policy_stops_the_learner(
    policy: Policy, engine: VllmEngine, prompts: list[EncodedPrompt], coarse: list[VllmEngine]
) -> None:
    def measured(outputs: Sequence[GroupOutput]) -> SamplerGap:
        tokens = [[c.token_ids for c in output.completions] for output in outputs]
        with torch.no_grad():
            scores = score_completions(policy, prompts, None, tokens, TEMPERATURE, path="naive")
        behaviour = torch.zeros_like(scores.logprobs)
        behaviour[scores.mask] = torch.cat([c.logprobs for output in outputs for c in output.completions])
        found = SamplerGap(policy, LearnerSection(steps=1))
        planned: list[Any] = [_Fresh(each) for each in tokens]
        found.add(planned, scores.logprobs, behaviour, scores.mask)
        return found

    load(policy, engine, 1)
    measured(engine.generate(requests(prompts))).check(0)
    engine.load(2, adapter_of(policy, 3))  # other weights than the learner has
    with pytest.raises(LearnerError, match=r"above learner\.max_sampler_gap=0\.01"):
        measured(engine.generate(requests(prompts))).check(0)
    (other,) = coarse
    assert not other.capabilities.exact_logprobs  # so that the comparison at start tells, and does not refuse
    other.load(1, adapter_of(policy, 1))
    with pytest.raises(LearnerError, match=r"above learner\.max_sampler_gap=0\.01"):
        measured(other.generate(requests(prompts))).check(0)


@dataclass
class _Fresh:
    """What of a planned group the gap is measured by."""

    learned_tokens: Sequence[torch.Tensor]
    staleness: int = 0


def test_the_start_up_comparison_holds_this_engine_against_generate(
    policy: Policy, engine: VllmEngine, prompts: list[EncodedPrompt]
) -> None:
    load(policy, engine, 0)
    found = choose_path(policy, prompts[:2], temperature=TEMPERATURE, engine=engine)
    assert found.sampler < BOUND


def test_what_does_not_fit_is_refused_and_the_engine_goes_on(
    policy: Policy, engine: VllmEngine, prompts: list[EncodedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(policy, engine, 1)
    weights = adapter_of(policy, 2) or {}
    for wrong in (
        {name.replace("layers.0", "layers.9"): tensor for name, tensor in weights.items()},
        {name: tensor[..., :-1] if ".lora_A." in name else tensor for name, tensor in weights.items()},
    ):
        with pytest.raises(AdapterError):
            engine.load(41, wrong)
    elsewhere = {name.replace("layers.0", "layers.9"): tensor for name, tensor in weights.items()}
    with pytest.raises(AdapterError, match=r"version 41 .* no place for 7 of the adapter's 14 layers"):
        engine._process.ask("load", version=41, adapter=engine._config, tensors=elsewhere, timeout_s=TIMEOUT_S)
    monkeypatch.setattr(engine, "_as_made", elsewhere)
    with pytest.raises(AdapterError, match=r"no place for 7 .*; take such layers out of model\.lora\.targets"):
        engine.try_adapter()
    monkeypatch.undo()
    with pytest.raises(ContextLengthError, match="max_model_len"):
        engine.generate(requests(prompts, tokens=1000))
    with pytest.raises(ContextLengthError, match=r"context of 256, or its engine's max_model_len"):
        check_context(policy, prompts[0], 250)  # so that a worker finds out sample by sample
    with pytest.raises(ConfigError, match="stop strings"):
        engine.generate([DecodeRequest(prompts[0], 1, SamplingParams(stop=("a",)))])
    with pytest.raises(ConfigError, match="value heads"):
        engine.generate([DecodeRequest(prompts[0], 1, SamplingParams(value_beta=1.0))])
    load(policy, engine, 1)
    assert gap(policy, prompts, engine.generate(requests(prompts))) < BOUND


def test_arguments_are_looked_at_before_a_run_begins(python: str) -> None:
    assert check(python, [], TIMEOUT_S) == check(python, ["gpu_memory_utilization", "dtype"], TIMEOUT_S) == python
    with pytest.raises(ConfigError, match=r"no argument 'gpu_memory_utilisation'; like it are .*gpu_memory_utilizat"):
        check(python, ["dtype", "gpu_memory_utilisation"], TIMEOUT_S)


def test_the_dry_run_counts_what_the_process_takes(python: str, tmp_path: Path) -> None:
    """Within 15 %, of a model that half of it is made of, and without an argument of vLLM's but `enforce_eager`."""
    build_tiny_llava(
        tmp_path, vocabulary=WORDS, image_size=24, hidden=768, heads=12, layers=5, vision_hidden=32, vision_layers=2
    )
    engine_section = {"kind": "vllm", "python": python, "enforce_eager": True}
    cfg = Config.model_validate(
        {
            "run": {"name": "x"},
            "model": {"path": str(tmp_path), "dtype": "float32", "lora": {"r": RANK}},
            "data": {"train": "x"},
            "rollout": {"max_new_tokens": 12, "engine": engine_section},
            "learner": {"steps": 1},
        }
    )
    policy = load_policy(cfg.model, device="cpu")
    shape = model_shape(policy.hf_model, cfg.model.lora, policy.dtype)
    add_adapter(policy, cfg.model.lora, seed=0)
    groups, context = cfg.rollout.groups_per_assignment, policy.context_length
    asked_of_it = groups * cfg.rollout.group_size
    settings: dict[str, Any] = {"rows": asked_of_it, "embeds": True, "threads": 1, "timeout_s": TIMEOUT_S}
    engine = start_engine(policy, cfg.rollout.engine, VisionCache(1 << 24), revision=None, **settings)
    samples = make_samples([(24, 24 + i) for i in range(groups)])
    prompts = prepared(policy, engine, samples)
    for version in (1, 2):
        engine.load(version, adapter_of(policy, version))
        engine.generate(requests(prompts, n=cfg.rollout.group_size, tokens=cfg.rollout.max_new_tokens))
    status = Path(f"/proc/{engine._process.facts['pid']}/status").read_text()
    (peak_kb,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    peak = 1024 * int(peak_kb)
    length = prompts[0].input_ids.numel()
    parts = engine_memory(cfg, shape, length, context=context, embeds=True)
    assert sum(parts.values()) == pytest.approx(peak, rel=0.15), parts
    assert parts["weights"] + parts["keys and values"] > peak / 2
    engine.close()


@pytest.mark.parametrize("policy", ["llava"], indirect=True)
def test_an_engine_ends_with_its_owner(coarse: list[VllmEngine]) -> None:
    pid = coarse[0]._process.facts["pid"]
    coarse.clear()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("policy", ["llava"], indirect=True)
def test_an_engine_that_is_killed_is_an_error_and_no_hang(policy: Policy, engine: VllmEngine) -> None:
    """The last of its tests."""
    prompts = prepared(policy, engine, long_samples(1))
    load(policy, engine, 0)
    killer = threading.Timer(0.3, os.kill, (engine._process.facts["pid"], signal.SIGKILL))
    killer.start()
    with pytest.raises(ProcessError, match="SIGKILL"):
        engine.generate(requests(prompts * 400, n=16, tokens=150))  # seconds of work
    killer.join()
    with pytest.raises(ProcessError, match="not running"):
        engine.generate(requests(prompts))
