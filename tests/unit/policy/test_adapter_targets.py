"""Which layers an adapter sits on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from mmrl_ray.config.model import LoraSection
from mmrl_ray.errors import AdapterError
from mmrl_ray.policy.adapter import add_adapter, resolve_targets
from mmrl_ray.policy.load import Policy
from tests.support.tiny_models import FAMILIES

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
