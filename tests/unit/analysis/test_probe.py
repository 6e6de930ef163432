"""Importance and states of real (tiny) models of every family, against the paths that runs use and small steps."""

from __future__ import annotations

import functools
import tempfile

import pytest
import torch

from mmrl_ray.analysis.attribution import caption_importance, caption_states, forward_rows, places
from mmrl_ray.config.sections import LoraSection
from mmrl_ray.errors import ModelError
from mmrl_ray.policy.lora.adapter import add_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import vision_features
from tests.support.tiny_models import FAMILIES, load_family, make_completions, make_samples

TEMPERATURE = 0.7


@functools.cache
def family(name: str) -> Policy:
    with tempfile.TemporaryDirectory() as folder:
        return load_family(name, folder)


def inputs(policy: Policy):  # type: ignore[no-untyped-def]
    prompts = encode_prompts(policy, make_samples())
    captions = [c for (c,) in make_completions(policy, [[4], [6], [3]])]
    return prompts, vision_features(policy, prompts), captions


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_that_of_the_policy_that_learns(name: str) -> None:
    policy = family(name)
    prompts, features, captions = inputs(policy)
    scores = score_completions(policy, prompts, features, [[c] for c in captions], TEMPERATURE)
    rows = zip(prompts, features, captions, strict=True)
    losses = [caption_importance(policy, p, f, c, temperature=TEMPERATURE).loss for p, f, c in rows]
    assert losses == pytest.approx((-scores.logprobs.sum(dim=1)).tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "gemma3"])
def test_an_importance_is_how_much_a_small_step_of_an_embedding_changes_the_loss(name: str) -> None:
    """The gradient of one image token by central differences, in the same forward but without autograd."""
    policy = family(name)
    (prompt, *_), (features, *_), (caption, *_) = inputs(policy)
    found = caption_importance(policy, prompt, features, caption, by_token=True)
    assert found.image_tokens is not None
    where = places(policy, [prompt], [caption]).image[0].nonzero()[:, 0]
    token = int(found.image_tokens.argmax())
    width = policy.hf_model.get_input_embeddings().weight.shape[1]
    step = 2e-2
    gradient = torch.zeros(width, dtype=torch.float64)
    for dimension in range(width):
        losses = []
        for sign in (1, -1):

            def nudge(e: torch.Tensor, dimension: int = dimension, sign: int = sign) -> torch.Tensor:
                e = e.clone()
                e[0, where[token], dimension] += sign * step
                return e

            with torch.no_grad():
                rows = forward_rows(policy, [prompt], [features], [caption], nudge)
                logits = policy.hf_model.get_output_embeddings()(rows.hidden[0]).double()
                logits[:, list(policy.image_token_ids)] = -torch.inf
                losses.append(-logits.log_softmax(dim=-1).gather(1, caption[:, None]).sum())
        gradient[dimension] = (losses[0] - losses[1]) / (2 * step)
    assert float(gradient.norm()) == pytest.approx(float(found.image_tokens[token]), rel=0.02)


def test_figures_fit_together_and_nothing_is_left_behind() -> None:
    with tempfile.TemporaryDirectory() as folder:
        policy = load_family("llava", folder)
    add_adapter(policy, LoraSection(), seed=0)
    (prompt, *_), (features, *_), (caption, *_) = inputs(policy)
    found = caption_importance(policy, prompt, features, caption, by_token=True)
    assert found.image_tokens is not None
    assert sum(found.share.values()) == pytest.approx(1.0)
    image = float(found.image_tokens.norm())
    assert found.image_tokens.shape == (9,)
    assert found.rms["image"] == pytest.approx(image / (9 * 32) ** 0.5, rel=1e-5)
    text = found.rms["text"] * ((prompt.input_ids.numel() - 9) * 32) ** 0.5
    assert found.share["image"] == pytest.approx(image / (image + text), rel=1e-5)
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert not policy.decoder._forward_pre_hooks
    again = caption_importance(policy, prompt, None, caption)
    assert again.image_tokens is None
    assert again.share["image"] == pytest.approx(found.share["image"], rel=1e-4), "the tower inside gives the same"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_state_is_of_its_own_sample_whatever_the_batch(name: str) -> None:
    policy = family(name)
    prompts, features, captions = inputs(policy)
    together = caption_states(policy, prompts, features, captions)
    for i in range(3):
        (alone,) = caption_states(policy, prompts[i : i + 1], features[i : i + 1], captions[i : i + 1])
        torch.testing.assert_close(together[i].action, alone.action)
        torch.testing.assert_close(together[i].hidden, alone.hidden, atol=1e-5, rtol=1e-4)
        for modality in ("image", "text"):
            torch.testing.assert_close(together[i].modalities[modality], alone.modalities[modality])


def test_states_are_means_of_what_enters_the_language_model() -> None:
    policy = family("llava")
    prompts, features, _ = inputs(policy)
    table = policy.hf_model.get_input_embeddings().weight
    said = torch.tensor([20, 21, policy.eos_token_ids[0]])
    nothing = torch.tensor([policy.eos_token_ids[0]])
    first, second = caption_states(policy, prompts[:2], features[:2], [said, nothing])
    torch.testing.assert_close(first.action, table[said[:2]].mean(dim=0), msg="the end of the turn is no word")
    torch.testing.assert_close(second.action, table[nothing[0]])
    torch.testing.assert_close(first.modalities["image"], features[0].tokens.mean(dim=0))
    words = prompts[0].input_ids[prompts[0].input_ids != policy.placeholder_id]
    torch.testing.assert_close(first.modalities["text"], table[words].mean(dim=0))


def test_what_cannot_be_told_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = family("llava")
    prompts, features, captions = inputs(policy)
    with pytest.raises(ValueError, match=r"lengths \[4, 0, 3\]"):
        caption_states(policy, prompts, features, [captions[0], captions[0][:0], captions[2]])
    with pytest.raises(ValueError, match="each of 3 prompts"):
        caption_states(policy, prompts, features, captions[:2])

    class Unseen(torch.nn.Module):
        """A language model that the forward does not call."""

    monkeypatch.setattr(Policy, "decoder", property(lambda self: Unseen()))
    with pytest.raises(ModelError, match="Unseen is not given embeddings"):
        caption_states(policy, prompts, features, captions)
