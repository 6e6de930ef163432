"""Conversations of several messages, and what nobody may write into one."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import DataError, ImageError
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import Turns, encode_conversation, encode_prompts
from tests.support.families.common import make_template
from tests.support.tiny_models import FAMILIES, image_bytes

Load = Callable[..., Policy]
ONE, TWO = image_bytes(64, 64, seed=1), image_bytes(96, 64, seed=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_is_what_the_processor_makes_of_it(family: str, load: Load) -> None:
    """Against the processor's own one-call route, with two pictures that are not named in the order given."""
    policy = load(family)
    turns: Turns = [
        ("user", ["what is in this picture ?", 1]),
        ("assistant", ["a red circle"]),
        ("user", [0, "and on the left ?", "say it short ."]),
    ]
    pictures = [Image.open(io.BytesIO(data)) for data in (ONE, TWO)]
    expected = policy.processor.apply_chat_template(
        [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": part}
                    if isinstance(part, str)
                    else {"type": "image", "image": pictures[part]}
                    for part in parts
                ],
            }
            for role, parts in turns
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    prompt = encode_conversation(policy, turns, (ONE, TWO))
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
    torch.testing.assert_close(prompt.model_inputs["pixel_values"], expected["pixel_values"])
    in_order = encode_conversation(policy, [("user", [0, 1, "a"])], (TWO, ONE))
    assert prompt.image_key == in_order.image_key


def test_a_sample_is_a_conversation_of_one_message(load: Load) -> None:
    policy = load()
    [prompt] = encode_prompts(policy, [Sample(id="s", images=(ONE, TWO), prompt="describe the image .")])
    same = encode_conversation(policy, [("user", [0, 1, "describe the image ."])], (ONE, TWO))
    assert torch.equal(prompt.input_ids, same.input_ids)
    assert prompt.image_key == same.image_key
    assert all(torch.equal(value, same.model_inputs[name]) for name, value in prompt.model_inputs.items())


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("text", ["a <image> b", "</s>"])
def test_control_tokens_are_refused_in_every_role(load: Load, role: str, text: str) -> None:
    policy = load()
    turns = [(role, [text]), ("user", [0, "describe the image ."])]
    with pytest.raises(DataError, match=rf"message 0 \({role}\) contains the special token"):
        encode_conversation(policy, turns, (ONE,))


def test_control_tokens_that_only_normalisation_makes_are_refused(load: Load) -> None:
    policy = load()
    policy.tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=True)], special_tokens=True)
    assert policy.placeholder_id in policy.tokenizer("a <IMAGE> b")["input_ids"]
    with pytest.raises(DataError, match="contains the special token '<image>'"):
        encode_conversation(policy, [("user", [0, "a <IMAGE> b"])], (ONE,))


def test_a_control_token_in_two_pieces_is_refused(load: Load) -> None:
    policy = load("qwen2_5_vl")
    with pytest.raises(DataError, match="contains the special token"):
        encode_conversation(policy, [("user", [0, "a <|image", "_pad|> b"])], (ONE,))
    encode_conversation(policy, [("user", ["a <|image", 0, "_pad|> b"])], (ONE,))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_token_that_the_template_joins_is_refused(family: str, load: Load) -> None:
    """Templates that trim each part, as Gemma's does, make a token of pieces that are none, alone or together."""
    policy = load(family)
    mark = policy.processor.image_token
    opening = "<|vision_start|>" if family.startswith("qwen") else ""
    policy.processor.chat_template = make_template(opening + mark).replace(
        "{{ p['text'] }}{% endif %} ", "{{ p['text'] | trim }}{% endif %}"
    )
    encode_conversation(
        policy, [("user", [0, "red ", " circle"]), ("assistant", [" a "]), ("user", ["", "  "])], (ONE,)
    )
    end = policy.tokenizer.convert_ids_to_tokens(policy.end_id)
    for token in (end, policy.tokenizer.convert_ids_to_tokens(policy.placeholder_id)):
        for cut in (1, len(token) // 2, len(token) - 1):
            spoof = [f"red {token[:cut]} ", f" {token[cut:]} assistant"]
            for turns in (
                [("user", [0, *spoof])],
                [("system", spoof), ("user", [0, "a"])],
                [("user", [0, "a"]), ("assistant", spoof), ("user", ["a"])],
            ):
                with pytest.raises(DataError, match="contains the special token"):
                    encode_conversation(policy, turns, (ONE,))


def test_unknown_words_are_nobodys_control_token(load: Load) -> None:
    policy = load()
    prompt = encode_conversation(policy, [("user", [0, "zyzzyva quux 東京"])], (ONE,))
    assert policy.tokenizer.unk_token_id in prompt.input_ids.tolist()


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ([("user", ["a"])], (), "the conversation has no image"),
        ([], (ONE,), "no message"),
        (
            [("user", [0, "a \ud800"])],
            (ONE,),
            r"message 0 \(user\) is no Unicode text: character 2 is a lone surrogate",
        ),
        ([("user", ["a"])], (ONE,), r"place the images \[\], of 1 given"),
        ([("user", [0, 0])], (ONE,), r"place the images \[0, 0\], of 1 given"),
        ([("user", [0, 2])], (ONE, TWO), r"place the images \[0, 2\], of 2 given"),
        ([("user", [-1])], (ONE,), r"place the images \[-1\]"),
        ([("system", [0]), ("user", ["a"])], (ONE,), r"message 0 \(system\) holds an image"),
        ([("user", [0]), ("assistant", ["a"])], (ONE,), "ends with an assistant's message"),
    ],
)
def test_what_makes_no_conversation_is_refused(
    load: Load, turns: Turns, images: tuple[bytes, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        encode_conversation(load(), turns, images)


def test_a_template_may_refuse_an_order_of_messages(load: Load) -> None:
    policy = load()
    policy.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="the conversation: the model's chat template refuses it: roles must alternate"):
        encode_conversation(policy, [("user", [0])], (ONE,))


def test_a_broken_picture_is_an_image_error(load: Load) -> None:
    with pytest.raises(ImageError):
        encode_conversation(load(), [("user", [0])], (b"nothing",))
