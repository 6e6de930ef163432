from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.prompts import encode_caption, encode_prompts
from mmrl_ray.policy.tiny import build_tiny_llava, build_tokenizer, words_of
from tests.support.tiny_models import image_bytes

TEXTS = ["Describe the image.", "A red circle is left of a small blue square.", "There is a circle; it is red!"]


def test_the_default_size(tmp_path: Path) -> None:
    folder = build_tiny_llava(tmp_path, vocabulary=TEXTS)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 2e6
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "LlavaProcessor"
    policy = load_policy(ModelSection(path=str(folder)), device="cpu")
    [prompt] = encode_prompts(policy, [Sample("0", (image_bytes(50, 90),), "Describe the image.")])
    assert int((prompt.input_ids == policy.placeholder_id).sum()) == 64
    assert policy.tokenizer.unk_token_id not in prompt.input_ids.tolist()


def test_the_benchmarks_prompt_has_261_tokens(tmp_path: Path) -> None:
    build_tiny_llava(tmp_path, vocabulary=["describe"], image_size=128, hidden=32, layers=1, vision_layers=1)
    policy = load_policy(ModelSection(path=str(tmp_path)), device="cpu")
    [prompt] = encode_prompts(policy, [Sample("0", (image_bytes(),), "describe")])
    assert prompt.input_ids.numel() == 261


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    folders = [
        build_tiny_llava(tmp_path / str(i), vocabulary=TEXTS, hidden=32, layers=1, vision_layers=1, seed=seed)
        for i, seed in enumerate((3, 3, 4))
    ]
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's generator was touched"
    first, second, third = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second
    assert first != third


def test_words_and_natural_spacing() -> None:
    assert words_of(["A red, red circle.", "red"])[0] == "red"
    tokenizer = build_tokenizer(TEXTS)
    text = "there is a red circle; it is left of a small square!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text.replace(";", " ;")
    assert tokenizer("zebra", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_captions_round_trip(tmp_path: Path) -> None:
    build_tiny_llava(tmp_path, vocabulary=TEXTS, hidden=32, layers=1, vision_layers=1)
    policy = load_policy(ModelSection(path=str(tmp_path)), device="cpu")
    ids = encode_caption(policy, "A red circle is left of a small blue square.")
    assert policy.tokenizer.decode(ids, skip_special_tokens=True) == "a red circle is left of a small blue square."


def test_a_patch_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size=65 is not a multiple of patch_size=8"):
        build_tiny_llava(tmp_path, vocabulary=TEXTS, image_size=65)
