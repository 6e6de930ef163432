from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import VisionFeatures
from mmrl_ray.policy import parity, vision
from mmrl_ray.policy.generation.base import Capabilities, DecodeRequest, GenerationEngine, GroupOutput
from mmrl_ray.policy.generation.decode import Decoder, decode_groups
from mmrl_ray.policy.generation.sampling import RowSampler
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import choose_path, compare
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring import packed, prefix
from mmrl_ray.policy.scoring.packed import checkpoint_layers
from tests.support.tiny_models import FAMILIES, make_samples

Load = Callable[..., Policy]


def with_lora(policy: Policy) -> Policy:
    config = LoraConfig(r=2, target_modules=r".*(language|text)_model.*\.(q|v)_proj", init_lora_weights=False)
    torch.manual_seed(0)
    policy.model = get_peft_model(policy.hf_model, config).eval()
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_may_share_the_prefix(family: str, load: Load) -> None:
    policy = with_lora(load(family))
    choice = choose_path(policy, encode_prompts(policy, make_samples()[:2]), temperature=0.7)
    assert choice.path == "shared_prefix"
    assert choice.inject_vision
    assert choice.largest_gap <= 1e-5
    assert choice.wanted_gap.gradient is not None
    assert choice.wanted_gap.gradient <= 1e-5
    assert "agrees" in choice.reason


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_sampler_with_other_logits_than_the_model_is_refused(
    family: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a model scales what its head gives, and the decode loop calls the head alone."""
    right = RowSampler.sample

    def scaled(self: RowSampler, logits: torch.Tensor, *args: Any) -> Any:
        return right(self, 0.7 * logits, *args)

    monkeypatch.setattr(RowSampler, "sample", scaled)
    policy = load(family)
    prompts = encode_prompts(policy, make_samples()[:2])
    comparison = compare(policy, prompts)
    naive, shared = comparison.gaps
    assert comparison.sampler > 100 * comparison.bound
    assert naive.to_sampler == pytest.approx(comparison.sampler, rel=1e-3)
    assert max(naive.to_model, shared.to_model) <= 1e-5
    with pytest.raises(ModelError, match=r"the sampler differs from the model's own forward by [\d.]+ nats") as caught:
        choose_path(policy, prompts)
    assert policy.path in str(caught.value)
    assert f"({policy.hf_model.config.model_type})" in str(caught.value)
    assert f"mmrl check {policy.path}" in str(caught.value)


class ForeignEngine(GenerationEngine):
    """An engine whose completions end after one, two, … tokens, with log-probs that are off by so many nats."""

    name = "foreign"

    def __init__(self, policy: Policy, off: float = 0.0, *, exact: bool = True) -> None:
        self.capabilities = Capabilities(False, False, False, exact_logprobs=exact, reproducible=True)  # type: ignore[misc]
        self._policy, self._off = policy, off

    def load(self, version: int, weights: Mapping[str, torch.Tensor] | None) -> None:
        raise AssertionError("a comparison loads nothing")

    def _generate(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        outputs = decode_groups(Decoder(self._policy), requests)
        return [replace(output, completions=tuple(self._cut(output))) for output in outputs]

    def _cut(self, output: GroupOutput) -> Any:
        for i, c in enumerate(output.completions):
            yield replace(c, token_ids=c.token_ids[: 1 + i], logprobs=c.logprobs[: 1 + i] + self._off)


def test_the_engine_that_samples_is_what_is_compared(load: Load) -> None:
    policy = with_lora(load())
    prompts = encode_prompts(policy, make_samples()[:2])
    assert choose_path(policy, prompts, engine=ForeignEngine(policy)).largest_gap <= 1e-5
    with pytest.raises(ModelError, match=r"the sampler differs from the model's own forward by 0\.1 nats"):
        choose_path(policy, prompts, engine=ForeignEngine(policy, 0.1))


def test_an_engine_that_is_not_exact_is_told_and_not_refused_while_it_gives_numbers(load: Load) -> None:
    policy = load()
    prompts = encode_prompts(policy, make_samples()[:2])
    choice = choose_path(policy, prompts, engine=ForeignEngine(policy, -0.1, exact=False))
    assert choice.path == "shared_prefix"
    assert choice.sampler == pytest.approx(0.1, abs=1e-3)
    assert "log-probs of the foreign engine differ from it by up to 0.1 nats" in choice.reason
    with pytest.raises(ModelError, match="the sampler differs from the model's own forward by inf nats"):
        choose_path(policy, prompts, engine=ForeignEngine(policy, math.nan, exact=False))


def test_a_full_row_that_sees_its_future_is_refused(load: Load) -> None:
    """As where padded completions get the token type of a part that is seen both ways; `generate` never has it so."""
    policy = load("gemma3")
    prompts = encode_prompts(policy, make_samples()[:2])

    def both_ways(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("use_cache"):
            return None
        types = kwargs["token_type_ids"].clone()
        types[:, -8:] = 1
        return args, {**kwargs, "token_type_ids": types}

    handle = policy.core.register_forward_pre_hook(both_ways, with_kwargs=True)
    comparison = compare(policy, prompts, wanted="naive")
    handle.remove()
    (naive,) = comparison.gaps
    assert naive.causality > 10 * comparison.bound
    assert comparison.sampler <= 1e-5
    (trouble,) = comparison.troubles
    assert "naive path differs from the model's own forward by" in trouble
    assert "lets a later token of a completion move an earlier one by" in trouble
    assert compare(policy, prompts, wanted="naive").troubles == ()


def test_a_sampler_that_fails_is_refused_by_name(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> None:
        raise IndexError("no such head\nand more")

    monkeypatch.setattr(RowSampler, "sample", failing)
    policy = load()
    with pytest.raises(ModelError, match="the sampler failed: IndexError: no such head; choose"):
        choose_path(policy, encode_prompts(policy, make_samples()[:1]))


def test_generation_settings_of_a_checkpoint_are_not_the_models_forward(load: Load) -> None:
    policy = load()
    settings = GenerationConfig(
        repetition_penalty=2.0, eos_token_id=list(range(policy.vocab_size)), max_length=3, num_beams=2
    )
    policy.hf_model.generation_config = settings
    assert choose_path(policy, encode_prompts(policy, make_samples()[:2])).largest_gap <= 1e-5
    assert policy.hf_model.generation_config is settings


@pytest.mark.parametrize(("prompts", "forwards"), [(1, 46), (2, 78)])
def test_a_comparison_is_a_few_forwards(prompts: int, forwards: int, load: Load) -> None:
    """Two naive ones to try vision features, eight of the sampler, eight a completion (four a prompt) of `generate`,
    the naive path, and a prefix, tried and then used in two calls."""
    policy = with_lora(load())
    calls: list[None] = []
    policy.core.register_forward_pre_hook(lambda *_: calls.append(None))
    choose_path(policy, encode_prompts(policy, make_samples()[:prompts]))
    assert len(calls) == forwards


def test_bfloat16_passes_with_its_own_tolerance(load: Load) -> None:
    policy = load("qwen3_vl", dtype="bfloat16")
    choice = choose_path(policy, encode_prompts(policy, make_samples()[:2]))
    assert choice.path == "shared_prefix"
    assert choice.wanted_gap.to_model <= choice.bound
    assert choice.wanted_gap.gradient is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shifted_position_is_found(dtype: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load("qwen2_5_vl", dtype=dtype)
    prompts = encode_prompts(policy, make_samples()[:1])
    right = prefix.completion_positions

    def wrong(policy: Policy, start: torch.Tensor, length: int) -> torch.Tensor:
        return right(policy, start + 3, length)

    original = prefix._shared_rows

    def shared(*args: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(prefix, "completion_positions", wrong)
            return original(*args)

    monkeypatch.setattr(prefix, "_shared_rows", shared)
    choice = choose_path(policy, prompts)
    assert choice.path == "naive"
    assert "differs from the model's own forward by" in choice.reason
    assert choice.wanted_gap.to_model > choice.bound


def test_a_gradient_that_stops_at_the_prefix_is_found(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = with_lora(load())
    original = prefix._repeated

    def detached(*args: Any, **kwargs: Any) -> Any:
        chosen = original(*args, **kwargs)
        for layer in chosen.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return chosen

    monkeypatch.setattr(prefix, "_repeated", detached)
    choice = choose_path(policy, encode_prompts(policy, make_samples()[:1]))
    assert choice.path == "naive"
    assert choice.wanted_gap.to_model <= 1e-5
    assert choice.wanted_gap.gradient is not None
    assert choice.wanted_gap.gradient > 1e-3


def test_gradient_checkpointing_needs_the_naive_path(load: Load) -> None:
    policy = with_lora(load())
    prompts = encode_prompts(policy, make_samples()[:1])
    policy.hf_model.gradient_checkpointing_enable()
    assert choose_path(policy, prompts).path == "shared_prefix", "without train mode it does nothing"
    policy.model.train()
    choice = choose_path(policy, prompts)
    assert choice.path == "naive"
    assert choice.reason == "gradient checkpointing drops the prefix cache"
    assert math.isnan(choice.wanted_gap.to_model)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_may_pack_their_rows(family: str, load: Load) -> None:
    policy = with_lora(load(family))
    checkpoint_layers(policy)
    choice = choose_path(policy, encode_prompts(policy, make_samples()[:2]), temperature=0.7, wanted="packed")
    assert choice.path == "packed"
    assert choice.inject_vision
    assert choice.reason.startswith("packed row agrees with the model's own forward within 0.0")
    assert max(choice.wanted_gap.to_model, choice.wanted_gap.gradient or 0.0) <= 1e-5


def test_packed_rows_whose_completions_see_each_other_are_found(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind_to_segments(places: Any) -> torch.Tensor:
        return places.order[:, None, :] <= places.order[:, :, None]

    monkeypatch.setattr(packed, "_visible", blind_to_segments)
    policy = with_lora(load())
    choice = choose_path(policy, encode_prompts(policy, make_samples()[:1]), wanted="packed")
    assert choice.path == "naive"
    assert choice.reason.startswith("packed row differs from the model's own forward by")


def test_a_model_that_takes_no_mask_of_its_own_needs_the_naive_path(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "unpackable", lambda policy: "layer 1 is a linear_attention layer")
    policy = load()
    choice = choose_path(policy, encode_prompts(policy, make_samples()[:1]), wanted="packed")
    assert (choice.path, choice.reason) == ("naive", "layer 1 is a linear_attention layer")


def test_a_recurrent_layer_needs_the_naive_path(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    class RecurrentLayer:
        pass

    policy = load()
    original = parity.encode_prefix

    def hybrid(*args: Any) -> prefix.Prefix:
        made = original(*args)
        made.cache.layers[1] = RecurrentLayer()
        return made

    monkeypatch.setattr(parity, "encode_prefix", hybrid)
    choice = choose_path(policy, encode_prompts(policy, make_samples()[:1]))
    assert choice.path == "naive"
    assert choice.reason == "layer 1 keeps a RecurrentLayer, which cannot be repeated for several completions"


def test_a_forward_that_fails_is_the_reason(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    policy = load()
    monkeypatch.setattr(prefix, "_shared_rows", failing)
    choice = choose_path(policy, encode_prompts(policy, make_samples()[:1]))
    assert choice.path == "naive"
    assert choice.reason == "the shared-prefix forward failed: RuntimeError: no such kernel"


def test_features_that_do_not_stand_in_turn_the_injection_off_and_keep_the_prefix(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family whose forward works on the tower's output before it uses it (LLaVA-NeXT's packing, say)."""
    policy = load("internvl")
    original = vision._encode_batch

    def other(*args: Any) -> list[VisionFeatures]:
        return [VisionFeatures(f.tokens + 1) for f in original(*args)]

    monkeypatch.setattr(vision, "_encode_batch", other)
    choice = choose_path(policy, encode_prompts(policy, make_samples()[:2]))
    assert choice.path == "shared_prefix"
    assert not choice.inject_vision
    assert not policy.inject_vision
    assert "vision features are made in every forward (they change log-probs by" in choice.reason
