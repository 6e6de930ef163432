"""Which layers an adapter sits on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from mmrl_ray.config.sections import LoraSection
from mmrl_ray.errors import AdapterError
from mmrl_ray.policy.lora.adapter import add_adapter
from mmrl_ray.policy.lora.targets import left_out, left_out_line, resolve_targets
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from tests.support.tiny_models import FAMILIES, make_completions, make_samples

Load = Callable[..., Policy]


@pytest.mark.parametrize("family", FAMILIES)
def test_by_default_every_linear_layer_of_the_language_model_and_no_other(load: Load, family: str) -> None:
    policy = load(family)
    modules = dict(policy.hf_model.named_modules())
    names = resolve_targets(policy.hf_model, LoraSection())
    leaves = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rsplit(".", 1)[-1] for name in names} == leaves
    layers = policy.hf_model.config.get_text_config().num_hidden_layers
    assert len(names) == len(set(names)) == 7 * layers
    inside = {id(module) for module in policy.decoder.modules()}
    assert all(id(modules[name]) in inside and isinstance(modules[name], nn.Linear) for name in names)
    # Every linear layer that is left out belongs to the vision tower, the projector or the head.
    left_out = {n for n, m in modules.items() if isinstance(m, nn.Linear)} - set(names)
    towers = ("vision", "visual", "multi_modal_projector", "connector", "lm_head")
    assert all(any(tower in name for tower in towers) for name in left_out)
    add_adapter(policy, LoraSection(), seed=0)
    assert not policy.vision_trainable


def test_a_list_matches_by_suffix_within_the_language_model(load: Load) -> None:
    model = load().hf_model
    section = LoraSection(targets=["up_proj", "layers.1.self_attn.o_proj"])
    assert resolve_targets(model, section) == [
        "model.language_model.layers.0.mlp.up_proj",
        "model.language_model.layers.1.self_attn.o_proj",
        "model.language_model.layers.1.mlp.up_proj",
    ]
    # A suffix is one of whole components.
    with pytest.raises(AdapterError, match="matches no linear layer"):
        resolve_targets(model, LoraSection(targets=["p_proj"]))


def test_a_string_is_a_pattern_over_full_names(load: Load) -> None:
    model = load().hf_model
    section = LoraSection(targets=r"model\.language_model\.layers\.1\..*(q|k)_proj")
    assert resolve_targets(model, section) == [
        "model.language_model.layers.1.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.k_proj",
    ]


@pytest.mark.parametrize("targets", [["q_proj"], r".*q_proj"])
def test_matches_in_the_vision_tower_are_refused_unless_asked_for(load: Load, targets: list[str] | str) -> None:
    policy = load()
    with pytest.raises(AdapterError, match=r"matches 2 layers outside .*vision_tower.*q_proj.*adapt_vision: true"):
        resolve_targets(policy.hf_model, LoraSection(targets=targets))
    section = LoraSection(targets=targets, adapt_vision=True)
    names = resolve_targets(policy.hf_model, section)
    assert sum("vision_tower" in name for name in names) == 2
    assert sum("language_model" in name for name in names) == 2
    add_adapter(policy, section, seed=0)
    assert policy.vision_trainable


def test_the_projector_is_outside_the_language_model_too(load: Load) -> None:
    with pytest.raises(AdapterError, match=r"multi_modal_projector.linear_1"):
        resolve_targets(load().hf_model, LoraSection(targets=["linear_1"]))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"'q_prj' matches no linear layer of the model; nearest: q_proj"),
        (["up_proj", "value"], r"'value' matches no linear layer"),
        ([r"embed_tokens"], r"'embed_tokens' matches no linear layer"),
        (r"all-linear", r"'all-linear' matches no linear layer"),
        (r"(q_proj", r"not a regular expression"),
        ([], r"empty list"),
    ],
)
def test_targets_that_name_nothing_are_refused(load: Load, targets: list[str] | str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        resolve_targets(load().hf_model, LoraSection(targets=targets))


def test_the_head_is_adapted_only_when_it_has_a_weight_of_its_own(load: Load) -> None:
    model = load().hf_model
    assert resolve_targets(model, LoraSection(targets=["lm_head"])) == ["lm_head"]
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    with pytest.raises(AdapterError, match="also the embedding's"):
        resolve_targets(model, LoraSection(targets=["lm_head"]))


class _Experts(Llama4TextMoe):
    """In the place of a LLaVA's MLP."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states)[0].view_as(hidden_states)


def test_experts_and_a_router_that_gives_two_things_are_left_out_and_named(load: Load) -> None:
    policy = load()
    config = Llama4TextConfig(
        hidden_size=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=1, num_attention_heads=4
    )
    experts = _Experts(config).requires_grad_(False)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.1)
    policy.decoder.layers[1].mlp = experts  # type: ignore[index,union-attr]
    names = resolve_targets(policy.hf_model, LoraSection())
    mlp = [name.rsplit("mlp.", 1)[1] for name in names if "layers.1.mlp" in name]
    assert mlp == [f"shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    total = sum(p.numel() for p in policy.decoder.parameters())
    fused, router = left_out(policy.hf_model, names)
    assert (fused.kind, fused.layers, fused.tensors) == ("Llama4TextExperts", 1, ("gate_up_proj", "down_proj"))
    assert fused.parameters == 4 * 32 * 3 * 16
    assert (router.kind, router.parameters) == ("Llama4Router router", 4 * 32)
    line = left_out_line(policy.hf_model, names)
    assert line is not None
    assert line.startswith(
        f"LoRA leaves out {(fused.parameters + router.parameters) / total:.1%} of the language model"
    )
    assert "1 × Llama4TextExperts (gate_up_proj, down_proj" in line
    with pytest.raises(AdapterError, match=r"'router' matches no linear layer"):
        resolve_targets(policy.hf_model, LoraSection(targets=["router"]))
    add_adapter(policy, LoraSection(), seed=0)
    prompts = encode_prompts(policy, make_samples()[:1])
    score_completions(
        policy, prompts, None, make_completions(policy, [[3]]), 1.0, path="naive"
    ).logprobs.sum().backward()


def test_targets_that_leave_linear_layers_out_say_so(load: Load) -> None:
    model = load().hf_model
    assert left_out_line(model, resolve_targets(model, LoraSection())) is None
    found = left_out(model, resolve_targets(model, LoraSection(targets=r"model\.language_model\..*(q|up)_proj")))
    kinds = {f"Linear {name}" for name in ("k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")}
    assert {each.kind for each in found} == kinds
    assert all(each.layers == 2 for each in found)
