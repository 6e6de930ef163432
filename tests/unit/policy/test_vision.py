from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, SiglipVisionConfig
from transformers.models.perception_lm.configuration_perception_lm import PerceptionLMConfig
from transformers.models.perception_lm.modeling_perception_lm import PerceptionLMForConditionalGeneration

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import PER_TOKEN, encode_prompts, without_pixels
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import VisionCache, image_inputs, injected, vision_features
from tests.support.families import BUILDERS
from tests.support.tiny_models import FAMILIES, make_completions, make_samples

Load = Callable[..., Policy]


def features_of(floats: int) -> VisionFeatures:
    return VisionFeatures(torch.zeros(floats, 1))


def test_cache_keeps_to_its_budget_and_drops_the_least_recently_used() -> None:
    cache = VisionCache(budget_bytes=100)
    cache.put("a", features_of(10))
    cache.put("b", features_of(10))
    assert cache.get("a") is not None
    cache.put("c", features_of(10))  # 120 bytes: b was used longest ago
    assert cache.get("b") is None
    assert cache.get("a") is not None
    assert cache.get("c") is not None
    assert (cache.nbytes, len(cache), cache.hits, cache.misses) == (80, 2, 3, 1)
    cache.put("a", features_of(5))
    assert cache.nbytes == 60
    cache.put("huge", features_of(26))
    assert cache.get("huge") is None
    assert cache.nbytes == 60
    cache.clear()
    assert (cache.nbytes, len(cache)) == (0, 0)


def test_a_budget_of_nothing_keeps_nothing() -> None:
    cache = VisionCache(0)
    cache.put("a", features_of(1))
    assert len(cache) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_features_are_bitwise_those_of_the_tower_whatever_else_was_missing(family: str, load: Load) -> None:
    policy = load(family)
    prompts = encode_prompts(policy, make_samples())
    cache = VisionCache(1 << 20)
    [alone] = vision_features(policy, prompts[1:2], cache)
    together = vision_features(policy, prompts, cache)
    fresh = vision_features(policy, prompts)
    assert (cache.hits, cache.misses) == (1, 3)
    assert together[1] is alone
    for cached, made in zip(together, fresh, strict=True):
        assert torch.equal(cached.tokens, made.tokens)
        assert len(cached.deepstack) == len(made.deepstack) == (2 if family == "qwen3_vl" else 0)
        assert all(torch.equal(a, b) for a, b in zip(cached.deepstack, made.deepstack, strict=True))
        assert not made.tokens.requires_grad
    assert cache.nbytes == sum(features.nbytes for features in together)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_through_the_tower_gives_each_sample_its_own(
    family: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU samples of equal shapes go through the tower together; on a CPU each goes alone."""
    policy = load(family)
    prompts = encode_prompts(policy, make_samples([(64, 64), (64, 64), (96, 64)]))
    calls = []
    original = policy.core.get_image_features

    def counted(**kwargs: object) -> object:
        calls.append(kwargs)
        return original(**kwargs)

    counted.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(policy.core, "get_image_features", counted, raising=False)
    expected = vision_features(policy, prompts)
    assert len(calls) == 3
    calls.clear()
    monkeypatch.setattr("mmrl_ray.policy.vision._alone", lambda policy: False)
    got = vision_features(policy, prompts)
    assert len(calls) < 3
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.tokens, theirs.tokens, rtol=1e-4, atol=1e-5)
        assert mine.tokens.untyped_storage().nbytes() == mine.tokens.nbytes, "a slice keeps its whole batch"


def test_equal_images_are_encoded_once(load: Load) -> None:
    policy = load()
    [sample] = make_samples([(64, 64)])
    prompts = encode_prompts(policy, [sample, sample])
    first, second = vision_features(policy, prompts)
    assert first is second


def test_nothing_is_cached_while_the_tower_trains(load: Load) -> None:
    policy = load()
    prompts = encode_prompts(policy, make_samples()[:1])
    cache = VisionCache(1 << 20)
    vision_features(policy, prompts, cache)
    assert not policy.vision_trainable
    policy.decoder.requires_grad_(True)
    assert not policy.vision_trainable
    weight = policy.core.multi_modal_projector.linear_1.weight.requires_grad_(True)
    assert policy.vision_trainable
    features = vision_features(policy, prompts, cache)
    assert (cache.hits, cache.misses) == (0, 1)
    scores = score_completions(policy, prompts, features, make_completions(policy, [(2, 3)]), 1.0)
    scores.logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.norm() > 0


def test_an_adapter_on_the_tower_counts_even_where_it_takes_no_gradient(load: Load) -> None:
    from peft import LoraConfig, get_peft_model

    policy = load()
    config = LoraConfig(r=2, target_modules=r".*multi_modal_projector\.linear_1")
    policy.model = get_peft_model(policy.hf_model, config)
    policy.model.requires_grad_(False)
    assert policy.vision_trainable


def test_the_models_own_method_is_back_after_an_error(load: Load) -> None:
    policy = load()
    prompts = encode_prompts(policy, make_samples()[:1])
    features = vision_features(policy, prompts)

    def fail() -> None:
        with injected(policy, features):
            assert torch.equal(policy.core.get_image_features().pooler_output[0], features[0].tokens)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    again = vision_features(policy, prompts)
    assert torch.equal(features[0].tokens, again[0].tokens)


def test_missing_pixels_and_foreign_placeholders_are_errors(load: Load) -> None:
    policy = load()
    prompts = encode_prompts(policy, make_samples()[:1])
    with pytest.raises(ModelError, match="without pixels"):
        vision_features(policy, [without_pixels(prompts[0])])
    policy.placeholder_id = policy.eos_token_ids[0]
    with pytest.raises(ModelError, match="9 tokens for 0 placeholders"):
        vision_features(policy, prompts)


def test_features_do_nothing_where_they_cannot_stand_in(load: Load) -> None:
    policy = load()
    prompts = encode_prompts(policy, make_samples()[:2])
    completions = make_completions(policy, [(3,), (2,)])
    expected = score_completions(policy, prompts, None, completions, 1.0)
    policy.inject_vision = False
    features = vision_features(policy, prompts)
    assert [f.nbytes for f in features] == [0, 0]
    assert torch.equal(score_completions(policy, prompts, features, completions, 1.0).logprobs, expected.logprobs)


@pytest.mark.parametrize("family", ["idefics2", "llava_onevision", "minicpmv4_6", "pixtral", "qwen2_vl", "smolvlm"])
def test_inputs_of_several_prompts_are_batched_as_their_processor_batches_them(family: str) -> None:
    processor = BUILDERS[family]().processor
    pictures = [Image.open(io.BytesIO(sample.images[0])) for sample in make_samples()]
    mark = re.search(r"image' %}(.+?){% else %}", processor.chat_template)
    assert mark is not None

    def process(pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
        made = processor(
            text=[mark[1]] * len(pictures),
            images=[[picture] for picture in pictures],
            padding=True,
            return_tensors="pt",
            return_mm_token_type_ids=False,
        )
        return dict(made)

    def prompt(picture: Image.Image) -> EncodedPrompt:
        made = process([picture])
        ids = made.pop("input_ids")[0]
        return EncodedPrompt(ids, {n: v for n, v in made.items() if n not in ("attention_mask", *PER_TOKEN)}, "")

    mine = image_inputs([prompt(picture) for picture in pictures])
    batch = process(pictures)
    assert "pixel_values" in mine
    for name, value in mine.items():
        assert torch.equal(value, batch[name]), name


def test_prompts_of_unequal_tiles_score_together_as_alone(load: Load) -> None:
    """PerceptionLM says nowhere which tiles are padding: against its own forward, a prompt at a time."""
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1, image_size=16, patch_size=4,
        model_args={"embed_dim": 32},
    )  # fmt: skip
    text = LlamaConfig(vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = PerceptionLMConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), vision_use_cls_token=False,
        projector_pooling_ratio=2, image_token_id=3, video_token_id=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PerceptionLMForConditionalGeneration(config).eval()
    policy = replace(load(), model=model, placeholder_id=3, image_token_ids=(3, 4), pad_token_id=0)
    prompts, expected = [], []
    completion = torch.tensor([9, 10, 11, 12])
    for tiles in (1, 3):
        ids, pixels = torch.tensor([*([3] * 4 * tiles), 7, 8]), torch.randn(1, tiles, 3, 16, 16)
        prompts.append(EncodedPrompt(ids, {"pixel_values": pixels}, str(tiles)))
        with torch.no_grad():
            logits = model(input_ids=torch.cat([ids, completion])[None], pixel_values=pixels).logits[0, :, :]
        logits[:, [3, 4]] = -torch.inf
        expected.append(logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, completion[:, None])[:, 0])
    with torch.no_grad():
        scores = score_completions(policy, prompts, None, [[completion], [completion]], 1.0, path="naive")
    torch.testing.assert_close(scores.logprobs, torch.stack(expected), atol=1e-5, rtol=0)
