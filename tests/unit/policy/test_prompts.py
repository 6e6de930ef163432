from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ContextLengthError, DataError, ImageError, ModelError
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import (
    PER_TOKEN,
    check_context,
    encode_caption,
    encode_conversation,
    encode_prompts,
    without_pixels,
)
from mmrl_ray.policy.tokens import answer_opening
from tests.support.tiny_models import FAMILIES, image_bytes

Load = Callable[..., Policy]
Copied = Callable[[str], Path]


def sample_with(prompt: str = "describe the image .", *images: bytes) -> Sample:
    return Sample(id="s7", images=images or (image_bytes(),), prompt=prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_what_the_processor_makes_of_the_chat(family: str, load: Load) -> None:
    """Against the processor's own one-call route."""
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
def test_a_tokenizer_that_begins_and_ends_every_text_does_neither_to_a_prompt_twice(
    family: str, copied: Copied
) -> None:
    """Against the processor's own one-call route, which leaves the tokenizer's end behind the prompt."""
    folder = copied(family)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    first, last = "<bos>" if "<bos>" in ids else "<unk>", "</s>"
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [_special(first), {"Sequence": {"id": "A", "type_id": 0}}, _special(last)],
        "pair": [_special(first), {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (first, last)},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    policy = load_policy(ModelSection(path=str(folder), dtype="float32"), device="cpu")
    begins, ends = policy.tokenizer("a")["input_ids"][0], policy.tokenizer("a")["input_ids"][-1]
    assert (begins, ends) == (ids[first], ids[last]), "the tokenizer does as it was told"
    sample = sample_with("what is in this picture ?", image_bytes(64, 96, seed=3))
    content = [
        {"type": "image", "image": Image.open(io.BytesIO(sample.images[0]))},
        {"type": "text", "text": sample.prompt},
    ]
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    theirs = policy.processor.apply_chat_template([{"role": "user", "content": content}], **chat)["input_ids"][
        0
    ].tolist()
    [prompt] = encode_prompts(policy, [sample])
    assert prompt.input_ids.tolist() == (theirs[:-1] if theirs[-1] == ends else theirs)
    assert policy.tokenizer.decode(prompt.input_ids[-2:]).replace(" ", "") == "assistant:"
    assert prompt.input_ids.tolist().count(ids[first]) == 1
    for name in PER_TOKEN:
        assert prompt.model_inputs.get(name, prompt.input_ids).shape == prompt.input_ids.shape
    spoken = encode_conversation(policy, [("user", [0, sample.prompt])], sample.images)
    assert torch.equal(spoken.input_ids, prompt.input_ids)
    assert encode_caption(policy, "a red circle").tolist()[-2:] == [*policy.tokenizer.encode("circle")[1:-1], ends]


def _special(token: str) -> dict[str, dict[str, str | int]]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


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


CHAT = (
    "{% for m in messages %}{{ m.role | upper }}:OPEN{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}LEAD{{ p.text | trim }}{% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}GAP</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:OPEN{% endif %}"
)


@pytest.mark.parametrize(("opening", "lead", "gap"), [("", " ", ""), ("{{ '\n' }}", "", ""), ("", " ", "{{ '\n' }}")])
@pytest.mark.parametrize(
    "spaces",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        pre_tokenizers.Metaspace(prepend_scheme="first"),
    ],
    ids=["byte level", "SentencePiece", "SentencePiece, first word"],
)
def test_a_caption_has_the_tokens_of_the_whole_conversation(
    copied: Copied, spaces: pre_tokenizers.PreTokenizer, opening: str, lead: str, gap: str
) -> None:
    """Against the processor's own call with the reply in place: white space around it is the template's, and where it
    is a token of its own or a word's first letter is the tokenizer's."""
    folder = copied("llava")
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "▁", "Ġ", "Ċ", *(chr(c) for c in range(33, 127)), "\n"]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    core.pre_tokenizer = spaces
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:5]])
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named, extra_special_tokens={"image_token": "<image>"})
    tokenizer.save_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.resize_token_embeddings(len(words))
    model.config.image_token_id = words.index("<image>")
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT.replace("OPEN", opening).replace("LEAD", lead).replace("GAP", gap))
    policy = load_policy(ModelSection(path=str(folder), dtype="float32"), device="cpu")
    sample = sample_with("what is this ?")
    content = [
        {"type": "image", "image": Image.open(io.BytesIO(sample.images[0]))},
        {"type": "text", "text": sample.prompt},
    ]
    [prompt] = encode_prompts(policy, [sample])
    for caption in ("A red circle .", "x", " A red circle ."):
        reply = {"role": "assistant", "content": [{"type": "text", "text": caption}]}
        [whole] = policy.processor.apply_chat_template([{"role": "user", "content": content}, reply], tokenize=True)
        mine = [*prompt.input_ids.tolist(), *encode_caption(policy, caption).tolist()]
        assert mine == list(whole)[: len(mine)]
        assert mine[-1] == words.index("</s>")


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
