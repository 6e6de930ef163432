from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ContextLengthError, DataError, ImageError, ModelError
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.prompts import check_context, encode_caption, encode_prompts, without_pixels
from mmrl_ray.policy.tokens import answer_opening
from tests.support.tiny_models import FAMILIES, image_bytes

Load = Callable[..., Policy]


def sample_with(prompt: str = "describe the image .", *images: bytes) -> Sample:
    return Sample(id="s7", images=images or (image_bytes(),), prompt=prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_what_the_processor_makes_of_the_chat(family: str, load: Load) -> None:
    """Against the processor's own one-call route."""
    import io

    from PIL import Image

    policy = load(family)
    sample = sample_with("what is in this picture ?", image_bytes(64, 96, seed=3))
    picture = Image.open(io.BytesIO(sample.images[0]))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": sample.prompt}]
    expected = policy.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    [prompt] = encode_prompts(policy, [sample])
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
    torch.testing.assert_close(prompt.model_inputs["pixel_values"], expected["pixel_values"])
    bos = policy.tokenizer.bos_token_id
    assert prompt.input_ids.tolist().count(bos) == (1 if family == "gemma3" else 0)
    opening = policy.tokenizer.decode(prompt.input_ids[-2:])
    assert opening.replace(" ", "") == "assistant:"


TURNS = (
    "{% for m in messages %}[{{ m.role }}]\n{% for p in m.content %}{{ p.text | trim }}{% endfor %}</s>\n{% endfor %}"
)
EMPTY_THOUGHT = (
    "{% for m in messages %}[{{ m.role }}]\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}</s>\n{% endfor %}"
)
ONE_MESSAGE = "{% if messages | length > 1 %}{{ raise_exception('one message, please') }}{% endif %}[user] a "


@pytest.mark.parametrize(
    ("turns", "opens", "expected"),
    [
        (TURNS, "[assistant]\n", ""),
        (TURNS, "[assistant]", ""),
        (TURNS, "[assistant]\n<think>\n", "<think>\n"),
        (TURNS, "[assistant]\n<s><think>", "<think>"),
        (TURNS, "[assistant]\n<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        (EMPTY_THOUGHT, "[assistant]\n<think>\n", "<think>\n"),
        (ONE_MESSAGE, "[assistant]\n<thought>\n", "<thought>\n"),
        (ONE_MESSAGE, "<|assistant|>", ""),
        (TURNS + "{% if messages | length > 2 %}{{ 1 + 'a' }}{% endif %}", "[assistant]\n<think>\n", "<think>\n"),
    ],
)
def test_what_a_template_writes_before_an_answer(turns: str, opens: str, expected: str, load: Load) -> None:
    processor = load().processor
    processor.chat_template = turns + "{% if add_generation_prompt %}" + opens + "{% endif %}"
    assert answer_opening(processor) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_user_text_are_refused(family: str, load: Load) -> None:
    policy = load(family)
    for token in (policy.tokenizer.convert_ids_to_tokens(policy.placeholder_id), policy.tokenizer.eos_token):
        with pytest.raises(DataError, match="sample 's7' contains the special token"):
            encode_prompts(policy, [sample_with(f"describe {token} this")])
        with pytest.raises(DataError, match="caption contains the special token"):
            encode_caption(policy, f"a {token} circle")
    for index in policy.image_token_ids:
        assert policy.tokenizer.convert_ids_to_tokens(index) in policy.reserved_texts


def test_a_caption_ends_with_the_end_token_and_reads_naturally(load: Load) -> None:
    policy = load()
    ids = encode_caption(policy, "A red circle, above the blue square.")
    assert ids.dtype == torch.int64
    assert ids[-1] == policy.end_id
    assert policy.tokenizer.decode(ids, skip_special_tokens=True) == "a red circle, above the blue square."


def test_the_context_is_checked(load: Load) -> None:
    policy = load()
    [prompt] = encode_prompts(policy, [sample_with()])
    room = policy.context_length - prompt.input_ids.numel()
    check_context(policy, prompt, room)
    with pytest.raises(ContextLengthError, match=f"max_new_tokens={room + 1} exceeds the model's context of 512"):
        check_context(policy, prompt, room + 1)


def test_the_image_key_names_pictures_settings_and_weights(load: Load) -> None:
    policy = load("qwen3_vl")
    one, two = image_bytes(seed=1), image_bytes(seed=2)
    samples = [sample_with("a", one), sample_with("b", one), sample_with("a", two), sample_with("a", one, two)]
    keys = [prompt.image_key for prompt in encode_prompts(policy, samples)]
    assert keys[0] == keys[1], "the text does not matter to the vision tower"
    assert len(set(keys)) == 3
    [swapped] = encode_prompts(policy, [sample_with("a", two, one)])
    assert swapped.image_key not in keys
    settings = {"size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 9 * 32 * 32}}
    other = load("qwen3_vl", processor=settings)
    [resized] = encode_prompts(other, samples[:1])
    assert resized.image_key not in keys
    assert other.revision_key != policy.revision_key


def test_processor_settings_reach_the_processor(load: Load) -> None:
    big = sample_with("a", image_bytes(160, 160))
    [default] = encode_prompts(load("qwen3_vl"), [big])
    settings = {"size": {"shortest_edge": 32 * 32, "longest_edge": 4 * 32 * 32}}
    [small] = encode_prompts(load("qwen3_vl", processor=settings), [big])
    assert small.model_inputs["image_grid_thw"].prod() < default.model_inputs["image_grid_thw"].prod()
    [whole] = encode_prompts(load("smolvlm", processor={"do_image_splitting": False}), [big])
    assert whole.model_inputs["pixel_values"].shape[1] == 1


def test_a_prompt_without_pixels_keeps_the_rest(load: Load) -> None:
    [prompt] = encode_prompts(load("qwen2_5_vl"), [sample_with()])
    light = without_pixels(prompt)
    assert set(prompt.model_inputs) - set(light.model_inputs) == {"pixel_values"}
    assert light.image_key == prompt.image_key


def test_broken_images_and_missing_images(load: Load) -> None:
    policy = load()
    with pytest.raises(ImageError):
        encode_prompts(policy, [sample_with("a", b"{}")])
    with pytest.raises(DataError, match="sample 's7' has no image"):
        encode_prompts(policy, [Sample(id="s7", images=(), prompt="a")])


def test_a_template_without_image_token_is_an_error(load: Load) -> None:
    policy = load()
    policy.processor.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ModelError, match="0 image tokens '<image>' into a prompt of 1 images"):
        encode_prompts(policy, [sample_with()])
