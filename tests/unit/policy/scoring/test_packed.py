"""Packed rows beyond what `test_prefix.py` holds for every path: checkpointing, attention kinds, windows, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.errors import ModelError
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring import packed
from mmrl_ray.policy.scoring.packed import checkpoint_layers, is_checkpointing
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import vision_features
from tests.support.tiny_models import FAMILIES, make_completions, make_samples
from tests.unit.policy.scoring.test_prefix import LENGTHS, TEMPERATURE, TOLERANCE, gradients, weighted, with_lora

Load = Callable[..., Policy]


def scored(policy: Policy, path: str, lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> torch.Tensor:
    prompts = encode_prompts(policy, make_samples())
    completions = make_completions(policy, lengths)
    features = vision_features(policy, prompts)
    scores = score_completions(policy, prompts, features, completions, TEMPERATURE, path=path)  # type: ignore[arg-type]
    return scores.logprobs[scores.mask]


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_give_the_same_logprobs_and_gradients(family: str, load: Load) -> None:
    policy = with_lora(load(family))
    expected = scored(policy, "naive")
    expected_gradients = gradients(policy, weighted([expected]))
    layers = len(policy.decoder.layers)  # type: ignore[arg-type]
    assert checkpoint_layers(policy) == layers
    assert is_checkpointing(policy)
    assert not any(module.training for module in policy.model.modules() if isinstance(module, nn.Dropout))
    calls: list[nn.Module] = []
    for layer in policy.decoder.layers:  # type: ignore[union-attr]
        layer.self_attn.register_forward_hook(lambda module, args, output: calls.append(module))
    got = scored(policy, "packed")
    assert len(calls) == layers
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=0)
    for name, gradient in gradients(policy, weighted([got])).items():
        theirs = expected_gradients[name]
        assert (gradient - theirs).norm() / theirs.norm() <= TOLERANCE, name
    assert len(calls) == 2 * layers, "no layer was computed a second time"


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_eager_attention_gives_the_same(family: str, load: Load) -> None:
    policy = load(family, attn_implementation="eager")
    torch.testing.assert_close(scored(policy, "packed"), scored(policy, "naive"), rtol=TOLERANCE, atol=0)


def test_one_window_for_all_layers(copied: Callable[[str], Path]) -> None:
    """Mistral's way: a sliding window, and no word on the kinds of layers."""
    folder = copied("llava")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"model_type": "mistral", "architectures": ["MistralModel"], "sliding_window": 6}
    (folder / "config.json").write_text(json.dumps(config))
    policy = load_policy(ModelSection(path=str(folder), dtype="float32"), device="cpu")
    assert type(policy.decoder).__name__ == "MistralModel"
    expected = scored(policy, "naive")
    torch.testing.assert_close(scored(policy, "packed"), expected, rtol=TOLERANCE, atol=0)
    policy.hf_model.config.get_text_config().sliding_window = None
    assert not torch.allclose(scored(policy, "naive"), expected, rtol=1e-2), "the window hides nothing"


def test_completions_of_one_token_leave_the_prompts_alone_in_their_rows(load: Load) -> None:
    policy = load()
    lengths = ((1, 1), (1,), (1,))
    torch.testing.assert_close(
        scored(policy, "packed", lengths), scored(policy, "naive", lengths), rtol=TOLERANCE, atol=0
    )


def test_completions_are_blind_to_each_other(load: Load) -> None:
    policy = load("qwen2_5_vl")
    prompts = encode_prompts(policy, make_samples()[:1])
    features = vision_features(policy, prompts)
    [[first, second, third]] = make_completions(policy, [(4, 5, 3)])

    def logprobs(*completions: torch.Tensor) -> torch.Tensor:
        return score_completions(policy, prompts, features, [list(completions)], 1.0, path="packed").logprobs

    together, alone = logprobs(first, second, third), logprobs(second)
    torch.testing.assert_close(together[1, :5], alone[0], rtol=TOLERANCE, atol=0)


def test_models_that_cannot_take_a_mask_are_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load()
    assert packed.unpackable(policy) is None
    for facts, reason in (
        ({"_attn_implementation": "flash_attention_2"}, r"attn_implementation=flash_attention_2 takes no mask"),
        ({"layer_types": ["full_attention", "linear_attention"]}, r"layer 1 is a linear_attention layer"),
    ):
        config = SimpleNamespace(**{"_attn_implementation": "sdpa", **facts})
        monkeypatch.setattr(policy.hf_model.config, "get_text_config", lambda c=config: c)
        with pytest.raises(ModelError, match=f"prompt and completions cannot share a row: {reason}"):
            packed.packed_rows(policy, [], None, *[torch.empty(0)] * 3)


def test_layers_that_cannot_be_checkpointed_are_an_error(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load()
    monkeypatch.setattr(policy.hf_model, "get_decoder", lambda: nn.Linear(1, 1))
    with pytest.raises(ModelError, match=r"the layers of Linear cannot be checkpointed; set learner.gradient_check"):
        checkpoint_layers(policy)
