"""Kinds of LoRA adapters, each through sampler, merging, learner, weight sync, files and export; against plain PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForImageTextToText

from mmrl_ray.config.policy import LoraSection
from mmrl_ray.errors import AdapterError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.export.merged import dtypes_of, merge_rounding_once
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import (
    adapter_parameters,
    adapter_state,
    add_adapter,
    load_adapter,
    load_adapter_state,
    reference_policy,
    save_adapter,
)
from mmrl_ray.policy.lora.files import read_adapter_files
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.lora.targets import adaptable_layers, resolve_targets
from mmrl_ray.policy.lora.variants import dropout_on
from mmrl_ray.policy.memory import model_shape
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import compare
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from tests.support.tiny_models import build_family, make_completions, make_samples, section_of

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.0\..*up_proj": 6}, "alpha_pattern": {"q_proj": 3.0}},
    "orthogonal": {"init": "orthogonal"},
    "gaussian": {"init": "gaussian"},
    "vision": {"adapt_vision": True},
    "saved": {"adapt_vision": True, "targets": ["q_proj", "v_proj"], "modules_to_save": ["connector", "lm_head"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build_family("smolvlm", tmp_path_factory.mktemp("base"))
    torch.set_num_threads(threads)


def load(folder: Path, **section: Any) -> Policy:
    return load_policy(section_of("smolvlm", folder, **section), device="cpu")


def felt(policy: Policy) -> None:
    """Moves all that trains, from where it began."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(policy.model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_one_policy_from_sampler_to_export(name: str, folder: Path, tmp_path: Path) -> None:
    lora = LoraSection(r=4, alpha=8.0, **VARIANTS[name])
    bare, policy = load(folder), load(folder)
    prompts = encode_prompts(policy, make_samples()[:2])
    shape = model_shape(bare.hf_model, lora, torch.float32)
    add_adapter(policy, lora, seed=1)
    assert sum(p.numel() for p in adapter_parameters(policy.model)) == shape.trained_parameters
    assert policy.vision_trainable == shape.adapts_vision == (name in ("vision", "saved"))
    tokens = make_completions(policy, [[4], [4]])

    def scored(policy: Policy, path: Any = "naive") -> torch.Tensor:
        with torch.no_grad():
            return score_completions(policy, prompts, None, tokens, 1.0, path=path).logprobs

    begins = scored(bare)
    torch.testing.assert_close(scored(policy), begins, rtol=0, atol=2e-5)  # RL starts from the base
    again = load(folder)
    add_adapter(again, lora, seed=1)
    first, second = adapter_state(policy.model), adapter_state(again.model)
    assert all(torch.equal(first[key], second[key]) for key in first)
    felt(policy)
    now = scored(policy)
    assert (now - begins).abs().max() > 0.05
    with reference_policy(policy.model):
        assert torch.equal(scored(policy), begins)
    comparison = compare(policy, prompts, others=("packed",))
    assert comparison.troubles == ()
    assert comparison.largest_gap < 3e-5
    # Weight sync into a worker that samples with the adapter merged.
    load_adapter_state(again.model, adapter_state(policy.model))
    worker = VersionedPolicy(again)
    worker.load(1, adapter_state(policy.model))
    with worker.merged():
        sampling = SamplingParams(max_new_tokens=5, seed=3)
        outputs = decode_groups(Decoder(again), [DecodeRequest(prompt, 2, sampling) for prompt in prompts])
    drawn = [[c.token_ids for c in output.completions] for output in outputs]
    recorded = torch.cat([c.logprobs for output in outputs for c in output.completions])
    with torch.no_grad():
        learnt = score_completions(policy, prompts, None, drawn, 1.0, path="shared_prefix")
    assert (torch.exp(learnt.logprobs[learnt.mask] - recorded) - 1).abs().max() < 2e-5
    # Files: PEFT alone, and ours.
    save_adapter(policy.model, tmp_path)
    plain = load(folder)
    plain.model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), str(tmp_path)).eval()
    torch.testing.assert_close(scored(plain), now, rtol=0, atol=2e-5)
    mine = load(folder)
    load_adapter(mine, tmp_path)
    torch.testing.assert_close(scored(mine), now, rtol=0, atol=2e-5)
    # Merged for an export.
    assert merge_rounding_once(mine, dtypes_of(mine)) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(scored(mine), now, rtol=0, atol=5e-5)
    assert mine.hf_model.state_dict().keys() == bare.hf_model.state_dict().keys()
    # A server's pool.
    layers = adaptable_layers(bare.hf_model)
    if name in ("dora", "saved"):
        with pytest.raises(AdapterError, match="which rows that share one base with others' cannot go through: merge"):
            read_adapter_files(tmp_path, bare, layers, max_rank=8)
    else:
        assert read_adapter_files(tmp_path, bare, layers, max_rank=8).state.keys() == adapter_state(policy.model).keys()


def test_dropout_drops_where_it_is_switched_on_and_nowhere_else(folder: Path) -> None:
    policy = load(folder)
    add_adapter(policy, LoraSection(r=4, dropout=0.5), seed=1)
    felt(policy)
    prompts, tokens = encode_prompts(policy, make_samples()[:1]), make_completions(policy, [[3]])

    def scored() -> torch.Tensor:
        return score_completions(policy, prompts, None, tokens, 1.0, path="naive").logprobs

    once = scored()
    assert torch.equal(scored(), once)
    with dropout_on(policy.model):
        assert not torch.equal(scored(), scored())
    assert torch.equal(scored(), once)


def test_modules_that_train_whole_are_float32_in_a_base_of_16_bits(folder: Path) -> None:
    policy = load(folder, dtype="bfloat16")
    lora = LoraSection(r=4, adapt_vision=True, targets=["q_proj"], modules_to_save=["connector"])
    add_adapter(policy, lora, seed=1)
    assert {p.dtype for p in adapter_parameters(policy.model)} == {torch.float32}
    prompts = encode_prompts(policy, make_samples()[:1])
    comparison = compare(policy, prompts)
    assert comparison.troubles == ()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"init": "pissa_niter_16"}, "begins with weights that it takes out of the base.*write default, gaussian or"),
        ({"init": "olora"}, "with the adapter off the model would not be the policy that"),
        ({"init": "loftq"}, "a quantised base is written in model.quantization"),
        ({"init": False}, "draws B at random"),
        ({"init": "orthogonal", "r": 5}, r"needs even ranks, not \[5\]"),
        ({"rank_pattern": {"q_proj": 0}}, "ranks are from 1 to 1024"),
        ({"rank_pattern": {"q_(": 4}}, "'q_\\(' is not a regular expression"),
    ],
)
def test_a_config_that_is_no_adapter_says_why(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LoraSection(**keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rank_pattern": {"q_projj": 4}}, "'q_projj' fits none of the adapted layers, such as .*q_proj"),
        ({"modules_to_save": ["connectors"]}, "matches no module of the model; nearest: connector"),
        ({"modules_to_save": ["connector"]}, "outside the language model.*set model.lora.adapt_vision: true"),
        ({"modules_to_save": ["layers"], "adapt_vision": True}, "without a forward or without weights"),
        ({"modules_to_save": ["text_model"], "adapt_vision": True}, "which holds the language model"),
        ({"modules_to_save": ["mlp", "up_proj"], "adapt_vision": True}, "is inside .*mlp: name one of the two"),
    ],
)
def test_a_config_that_the_model_does_not_fit_says_why(keys: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(AdapterError, match=said):
        resolve_targets(load(folder).hf_model, LoraSection(**keys))
