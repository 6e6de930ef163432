from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from mmrl_ray.config.sections import LoraSection, ModelSection
from mmrl_ray.errors import ConfigError, ModelError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy import trial, vision
from mmrl_ray.policy.checkpoint import is_revision, revision_key_of
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.load import load_policy, load_skeleton
from mmrl_ray.policy.lora.adapter import add_adapter, save_adapter
from mmrl_ray.policy.model import Acceleration, Policy
from mmrl_ray.policy.parity import compare
from mmrl_ray.policy.prompts import encode_caption, encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from tests.support.tiny_models import FAMILIES, make_samples, section_of

Load = Callable[..., Policy]
Copied = Callable[[str], Path]

NEVER_SAMPLED = {
    "llava": ["<image>"],
    "qwen2_5_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "qwen3_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "internvl": ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    "smolvlm": ["<image>", "<fake_token_around_image>", "<global-img>"]
    + [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)],
    "gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
}


def section(folder: Path | str, **fields: object) -> ModelSection:
    return ModelSection(path=str(folder), **fields)  # type: ignore[arg-type]


def edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def rewrite_template(folder: Path, old: str, new: str) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace(old, new))


@pytest.fixture
def load(family_folder: Callable[[str], Path]) -> Load:
    """No copy of one that was loaded before, as other files have it."""
    return lambda name="llava", **fields: load_policy(section_of(name, family_folder(name), **fields), device="cpu")


def load_family_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_policy(family: str, load: Load) -> None:
    policy = load(family)
    assert not any(parameter.requires_grad for parameter in policy.model.parameters())
    assert not any(module.training for module in policy.model.modules())
    tokens = policy.tokenizer.convert_ids_to_tokens(list(policy.image_token_ids))
    assert sorted(tokens) == sorted(NEVER_SAMPLED[family])
    assert policy.tokenizer.convert_ids_to_tokens(policy.placeholder_id) in NEVER_SAMPLED[family]
    assert policy.eos_token_ids == (policy.tokenizer.eos_token_id,)
    assert policy.end_id == policy.tokenizer.eos_token_id
    assert policy.pad_token_id == policy.tokenizer.pad_token_id
    assert policy.context_length == 512
    assert policy.vocab_size == len(policy.tokenizer)
    assert policy.core is policy.hf_model.model
    assert policy.decoder is policy.hf_model.get_decoder()


@pytest.mark.parametrize(
    ("ending", "eos", "expected"),
    [
        ("<end_of_utterance>\n", "</s>", "<end_of_utterance>"),  # it ends a turn though nothing lists it
        ("<end_of_utterance>", ["</s>", "<end_of_utterance>"], "<end_of_utterance>"),
        ("\n</s>\n", ["<end_of_utterance>", "</s>"], "</s>"),
        (" ", "</s>", "</s>"),  # it ends nothing, and one token ends everything
    ],
)
def test_the_end_of_a_turn_is_the_templates(copied: Copied, ending: str, eos: str | list[str], expected: str) -> None:
    """Chat models end a turn with another token than the tokenizer's end of sequence."""
    folder = copied("smolvlm")
    rewrite_template(folder, "</s>", ending)
    ids_of = load_family_tokenizer(folder).convert_tokens_to_ids
    edit_json(folder / "generation_config.json", eos_token_id=ids_of(eos))
    policy = load_policy(section(folder), device="cpu")
    listed = [ids_of("</s>"), *(ids_of(eos) if isinstance(eos, list) else [ids_of(eos)]), ids_of(expected)]
    assert policy.eos_token_ids == tuple(dict.fromkeys(listed))
    assert policy.end_id == ids_of(expected)
    assert policy.end_id not in policy.image_token_ids
    assert encode_caption(policy, "a red circle")[-1] == policy.end_id
    skeleton = load_skeleton(section(folder))
    assert (skeleton.eos_token_ids, skeleton.end_id) == (policy.eos_token_ids, policy.end_id)


def test_the_end_of_a_turn_ends_a_caption(copied: Copied) -> None:
    """Greedy, of a model that says nothing else."""
    folder = copied("smolvlm")
    rewrite_template(folder, "</s>", "<end_of_utterance>")
    policy = load_policy(section(folder), device="cpu")
    turn = policy.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    head = policy.hf_model.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
    head.bias = torch.nn.Parameter(torch.zeros(policy.vocab_size).index_fill(0, torch.tensor([turn]), 9.0))
    request = DecodeRequest(encode_prompts(policy, make_samples([(64, 64)]))[0], 1, SamplingParams(greedy=True))
    [output] = decode_groups(Decoder(policy), [request])
    assert output.completions[0].token_ids.tolist() == [turn]
    assert output.completions[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("ending", "eos", "message"),
    [
        (
            "",
            ["</s>", "<end_of_utterance>"],
            r"no control token after an assistant's turn \(but ' '\), and 2 end tokens",
        ),
        ("{{ m['content'][0]['text'] | length }}</s>", "</s>", "ends an assistant's turn in different ways"),
    ],
)
def test_an_end_of_turn_that_cannot_be_told_is_an_error(
    copied: Copied, ending: str, eos: str | list[str], message: str
) -> None:
    folder = copied("smolvlm")
    rewrite_template(folder, "</s>", ending)
    edit_json(folder / "generation_config.json", eos_token_id=load_family_tokenizer(folder).convert_tokens_to_ids(eos))
    with pytest.raises(ModelError, match=rf"{folder.name}'.*{message}.*eos_token_id in .*generation_config"):
        load_policy(section(folder))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", r"cannot render a conversation: TypeError"),
        ("{{ raise_exception('no roles here') }}", r"cannot render a conversation: no roles here"),
        ("{% for m in messages %}{{ m.role }", r"cannot render a conversation: "),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", r"leaves out what the assistant says"),
        (
            "{% for m in messages %}{{ m.role }} {{ m.content[-1].text }}</s>{% endfor %}",
            r"put 0 image tokens '<image>' into a prompt of 1 images",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_the_models_fault(copied: Copied, template: str, message: str) -> None:
    folder = copied("llava")
    (folder / "chat_template.jinja").write_text(template)
    for load_any in (load_policy, load_skeleton):
        with pytest.raises(ModelError, match=rf"model '{folder}'.*{message}") as error:
            load_any(section(folder))
        assert "\n" not in str(error.value)


def test_a_processor_that_stumbles_is_the_models_fault(copied: Copied) -> None:
    folder = copied("llava")
    settings = json.loads((folder / "processor_config.json").read_text())
    del settings["patch_size"]
    (folder / "processor_config.json").write_text(json.dumps(settings))
    for load_any in (load_policy, load_skeleton):
        with pytest.raises(ModelError, match=rf"model '{folder}'.*the processor refuses it: TypeError.*mend its proc"):
            load_any(section(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sise": {"longest_edge": 32}}, r"model\.processor\.sise: .* has no such setting; did you mean size\?"),
        ({"do_image_spliting": False}, r"model\.processor\.do_image_spliting.*did you mean do_image_splitting\?"),
        ({"do_resize": True, "size": "large"}, r"model\.processor\.size='large': the processor of .* cannot use it"),
        ({"do_resize": "yes", "do_image_splitting": False}, r"model\.processor\.do_resize='yes': .* cannot use it"),
    ],
)
def test_settings_that_the_processor_does_not_take(
    family_folder: Copied, settings: dict[str, object], message: str
) -> None:
    for load_any in (load_policy, load_skeleton):
        with pytest.raises(ConfigError, match=message) as error:
            load_any(section(family_folder("smolvlm"), processor=settings))
        assert "\n" not in str(error.value)


def test_a_processor_and_a_model_that_count_otherwise_are_found_by_a_trial(copied: Copied) -> None:
    folder = copied("llava")
    edit_json(folder / "processor_config.json", num_additional_image_tokens=0)
    with pytest.raises(ModelError, match=rf"model '{folder}' \(llava\).*transformers' own forward: .*do not match"):
        load_policy(section(folder), device="cpu")
    load_skeleton(section(folder))  # it cannot know


@pytest.mark.parametrize(("old", "new"), [("</s>", "<|over|>"), ("assistant :", "<|over|>assistant :")])
def test_tokens_that_the_tokenizer_alone_has_are_refused(old: str, new: str, copied: Copied) -> None:
    """The end of a turn would never be said, and the header of one has no embedding."""
    folder = copied("llava")
    tokenizer = load_family_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|over|>"]})
    tokenizer.save_pretrained(folder)
    rewrite_template(folder, old, new)
    for attempt in (lambda: load_policy(section(folder), device="cpu"), lambda: load_skeleton(section(folder))):
        with pytest.raises(ModelError, match=r"writes '<\|over\|>' \(id 46\).* has 46 tokens"):
            attempt()


def test_padding_and_ends_that_the_model_does_not_have_do_no_harm(copied: Copied) -> None:
    folder = copied("llava")
    tokenizer = load_family_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    edit_json(folder / "generation_config.json", eos_token_id=[2, 10**6])
    policy = load_policy(section(folder), device="cpu")
    assert policy.eos_token_ids == (2,)
    assert policy.pad_token_id == 2
    assert compare(policy, encode_prompts(policy, make_samples()[:2])).troubles == ()


def test_broken_weights_are_the_checkpoints_fault(copied: Copied) -> None:
    folder = copied("llava")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("language_model.model.norm.weight"))
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"NaN, in transformers' own forward, too: its weights are broken"):
        load_policy(section(folder), device="cpu")


def test_a_context_too_short_for_any_picture_is_said_so(copied: Copied) -> None:
    folder = copied("llava")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text, "max_position_embeddings": 12})
    with pytest.raises(ModelError, match=rf"{folder}.*its context of 12 tokens does not hold a picture"):
        load_skeleton(section(folder))


def test_a_generation_config_that_cannot_be_read_is_not_passed_over(copied: Copied) -> None:
    folder = copied("llava")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3')
    for attempt in (lambda: load_policy(section(folder), device="cpu"), lambda: load_skeleton(section(folder))):
        with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
            attempt()
    (folder / "generation_config.json").unlink()
    load_policy(section(folder), device="cpu")


def test_a_model_that_only_transformers_can_use_is_refused_by_name(
    copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise IndexError("no axis 3")

    monkeypatch.setattr(trial, "score_completions", broken)
    folder = copied("qwen2_5_vl")
    edit_json(folder / "generation_config.json", pad_token_id=1)  # other files than those that have passed before
    message = rf"model '{folder}' \(qwen2_5_vl\).*transformers' own forward does not: IndexError: no axis 3"
    with pytest.raises(ModelError, match=message):
        load_policy(section(folder), device="cpu")


def test_features_that_cannot_stand_in_do_not_stop_a_model(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied("llava")
    edit_json(folder / "generation_config.json", pad_token_id=1)
    monkeypatch.setattr(vision, "_split", lambda pooled, counts: pooled.no_such_thing)
    assert not load_policy(section(folder), device="cpu").inject_vision


def test_the_revision_key_follows_weights_and_processor(copied: Copied) -> None:
    folder = copied("llava")
    before = load_policy(section(folder), device="cpu").revision_key
    assert load_policy(section(folder), device="cpu").revision_key == before
    weights = load_file(folder / "model.safetensors")
    weights["language_model.lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_policy(section(folder), device="cpu").revision_key != before


def test_the_revision_key_is_of_every_byte(copied: Copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fine-tunes of one size differ in a few bytes of a large file, wherever those are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = copied("llava")
    large = folder / "model-00002.safetensors"
    with large.open("wb") as file:
        file.truncate(200 << 20)
    keys = set()
    for changed in (None, 5 << 20, (64 << 20) + 7, (199 << 20) + 3):
        if changed is not None:
            with large.open("r+b") as file:
                file.seek(changed)
                file.write(b"x")
        os.utime(large, ns=(0, 0))  # as a copy that keeps its time stamp
        keys.add(revision_key_of(str(folder), section(folder), None))
    assert len(keys) == 4


def test_a_digest_is_kept_until_the_file_changes(
    copied: Copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = copied("llava")
    large = folder / "model-00002.safetensors"
    with large.open("wb") as file:
        file.truncate(70 << 20)

    def key() -> str:
        return revision_key_of(str(folder), section(folder), None)

    first = key()
    assert not list((tmp_path / "cache").rglob("*")), "a file that may still be being written is read again"
    long_ago = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: long_ago)
    assert key() == first
    [kept] = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    digest = kept.read_text()
    assert digest != "0" * 64
    kept.write_text("0" * 64)
    assert key() != first, "what is kept is what is used"
    with large.open("r+b") as file:
        file.write(b"\0")  # the same content, another time
    assert key() == first


def test_keys_that_were_kept_before_name_what_they_named(copied: Copied) -> None:
    """A reward's folder may hold a key of the time when large files were known by 16 samples of a MiB."""
    folder = copied("llava")
    large = b"".join(bytes([i]) * (1 << 20) for i in range(70))
    (folder / "model-00002.safetensors").write_bytes(large)
    digest = hashlib.sha256(b"[]")
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".jinja"):
            data = file.read_bytes()
            digest.update(f"{file.name}:{len(data)}".encode())
            starts = [i * (len(data) - (1 << 20)) // 15 for i in range(16)] if len(data) > 64 << 20 else []
            digest.update(b"".join(data[start : start + (1 << 20)] for start in starts) if starts else data)
    old, new = digest.hexdigest()[:16], revision_key_of(str(folder), section(folder), None)
    assert old != new
    assert is_revision(old, new, str(folder), {})
    assert not is_revision(old, new, str(folder), {"size": 1})


def test_dtype_and_attention_are_the_configs(load: Load) -> None:
    policy = load("llava", dtype="bfloat16", attn_implementation="eager")
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    assert policy.dtype == torch.bfloat16
    assert policy.hf_model.config._attn_implementation == "eager"
    assert load("llava", dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such-model", "a/b/c", "builtin:tiny-llava"])
def test_no_such_model(path: str) -> None:
    with pytest.raises(ModelError, match=r"does not exist|made into a folder") as error:
        load_policy(section(path))
    assert "\n" not in str(error.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("x")
    with pytest.raises(ModelError, match="is not a folder"):
        load_policy(section(file))


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_policy(section(tmp_path))


def test_a_text_model_has_no_vision_tower(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'llama', without a vision tower"):
        load_policy(section(tmp_path))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_no_chat_template(family: str, copied: Copied) -> None:
    folder = copied(family)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        load_policy(section(folder))


def test_a_chat_template_that_only_the_tokenizer_has(copied: Copied) -> None:
    folder = copied("llava")
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=text)
    assert load_policy(section(folder), device="cpu").processor.chat_template == text


@pytest.mark.parametrize("image_processor", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"])
def test_the_layout_of_older_checkpoints(image_processor: str, copied: Copied, load: Load) -> None:
    """Most Qwen-VL folders on the hub: settings in preprocessor_config.json, the template in chat_template.json."""
    folder = copied("qwen2_5_vl")
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    settings |= {"image_processor_type": image_processor, "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").unlink()
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    policy = load_policy(section(folder), device="cpu")
    [mine] = encode_prompts(policy, make_samples([(96, 64)]))
    [theirs] = encode_prompts(load("qwen2_5_vl"), make_samples([(96, 64)]))
    assert torch.equal(mine.input_ids, theirs.input_ids)
    torch.testing.assert_close(mine.model_inputs["pixel_values"], theirs.model_inputs["pixel_values"])


def test_no_processor(copied: Copied) -> None:
    folder = copied("llava")
    (folder / "processor_config.json").unlink()
    with pytest.raises(ModelError, match="processor"):
        load_policy(section(folder))


def test_no_image_token(copied: Copied) -> None:
    folder = copied("llava")
    config = json.loads((folder / "config.json").read_text())
    for name in ("image_token_id", "image_token_index"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**config, "image_token_index": None}))
    with pytest.raises(ModelError, match=r"config\.json cannot be read|names no image token"):
        load_policy(section(folder))


def test_missing_weights_are_not_made_up(copied: Copied) -> None:
    folder = copied("llava")
    weights = load_file(folder / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors, the first 'lm_head\.weight'"):
        load_policy(section(folder))


def test_weights_that_the_model_has_no_place_for_are_not_left_out(copied: Copied) -> None:
    """With a deeper model's weights under this config, transformers would go on with half of it and a warning."""
    folder = copied("llava")
    weights = load_file(folder / "model.safetensors")
    deeper = {
        n.replace(".layers.1.", ".layers.2."): t.clone()
        for n, t in weights.items()
        if "language_model.model.layers.1" in n
    }
    save_file({**weights, **deeper}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"hold {len(deeper)} tensors .* no place for \(.*layers\.2\.") as error:
        load_policy(section(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_weights_that_are_known_as_harmless_are(family: str, copied: Copied) -> None:
    folder = copied(family)
    weights = load_file(folder / "model.safetensors")
    weights |= {"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_policy(section(folder))


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_in_a_models_folder_is_never_put_on_unasked(whole: bool, copied: Copied, load: Load) -> None:
    folder = copied("llava")
    policy = load()
    add_adapter(policy, LoraSection(r=2), seed=0)
    save_adapter(policy.model, folder)
    if not whole:
        (folder / "config.json").unlink()
    message = "has an adapter beside its weights" if whole else "is an adapter, not a model: name its base"
    for read in (load_policy, load_skeleton):
        with pytest.raises(ModelError, match=message):
            read(section(folder))


def test_pickled_weights_are_refused(copied: Copied) -> None:
    folder = copied("llava")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="weights cannot be loaded"):
        load_policy(section(folder))


def test_a_skeleton_is_held_against_the_headers_of_the_weights(copied: Copied) -> None:
    folder = copied("qwen2_5_vl")
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.visual.blocks.1.attn.proj.weight"
    stored = name.removeprefix("model.")  # names of files are not those of the model
    save_file({**weights, stored: torch.zeros(3, 5)}, file, metadata={"format": "pt"})
    for load_any in (load_policy, load_skeleton):
        with pytest.raises(ModelError, match=rf"1 tensors .*'{re.escape(name)}': \[3, 5\], not \[32, 32\]"):
            load_any(section(folder))
    del weights[stored]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"model '{folder}': its weight files lack 1 tensors, the first '{name}'"):
        load_skeleton(section(folder))
    index = {"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    file.rename(folder / "model-1-of-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks model-2-of-2\.safetensors; fetch"):
        load_skeleton(section(folder))


def test_truncated_weights_are_an_error(copied: Copied) -> None:
    folder = copied("llava")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for load_any in (load_policy, load_skeleton):
        with pytest.raises(ModelError, match="weights cannot be loaded"):
            load_any(section(folder))


def test_a_skeleton_has_all_but_the_weights(family_folder: Copied, load: Load) -> None:
    policy = load("gemma3")
    skeleton = load_skeleton(section(family_folder("gemma3")))
    assert {parameter.device.type for parameter in skeleton.model.parameters()} == {"meta"}
    mine = {name: parameter.shape for name, parameter in skeleton.model.named_parameters()}
    assert mine == {name: parameter.shape for name, parameter in policy.model.named_parameters()}
    assert (skeleton.image_token_ids, skeleton.eos_token_ids) == (policy.image_token_ids, policy.eos_token_ids)
    [a], [b] = (encode_prompts(p, make_samples([(64, 64)])) for p in (skeleton, policy))
    assert torch.equal(a.input_ids, b.input_ids)
    assert a.image_key == b.image_key


def test_what_cannot_be_sampled_as_it_is_learnt_is_refused_by_name(
    family_folder: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mllama's way of looking at pictures, and a forward whose logits are not made of its last hidden states alone."""
    llava = section(family_folder("llava"), dtype="float32")

    def crossing(self: Any, input_ids: Any, cross_attention_mask: Any = None) -> None: ...

    def looking_back(self: Any, **inputs: Any) -> Any:
        output = self.model(**inputs)
        return SimpleNamespace(logits=self.lm_head(output.hidden_states[0]))

    for forward, loads, message in (
        (crossing, (load_skeleton, load_policy), r"look at pictures by cross-attention \(cross_attention_mask\)"),
        (looking_back, (load_policy,), r"forward of a LlavaForConditionalGeneration cannot be run from its hidden"),
    ):
        monkeypatch.setattr(LlavaForConditionalGeneration, "forward", forward)
        for load in loads:
            with pytest.raises(ModelError, match=f"^model .*llava.*{message}.*use another"):
                load(llava)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there a policy would be loaded onto the GPU")
@pytest.mark.parametrize(
    ("own", "expected"), [(None, "expandable_segments:True"), ("max_split_size_mb:64", "max_split_size_mb:64")]
)
def test_pytorch_is_told_to_let_segments_grow_also_where_the_environment_comes_too_late(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, own: str | None, expected: str
) -> None:
    """As on a Ray that was started by others: before anything is put on the GPU, of which there is none here."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
    if own is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", own)
    before = torch._C._accelerator_getAllocatorSettings()
    torch._C._accelerator_setAllocatorSettings(own or "expandable_segments:False")
    try:
        with pytest.raises(ModelError, match=r"CUDA|NVIDIA"):
            load_policy(section(family_folder("llava")), device="cuda")
        assert torch._C._accelerator_getAllocatorSettings() == expected
    finally:
        torch._C._accelerator_setAllocatorSettings(before or "expandable_segments:False")


def test_weights_that_a_gpu_has_no_room_for_are_told_so(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", full)
    with pytest.raises(ModelError, match=r"cpu has too little free memory for its weights: .*2\.00 GiB"):
        load_policy(section(family_folder("llava")), device="cpu")


WITHOUT_CPU = """
import sys
sys.modules["mmrl_ray.policy.cpu"] = None  # as if the file were not there
from pathlib import Path
from tests.unit.policy.test_load import section, tokens_with_adapter
from mmrl_ray.policy.load import load_policy
policy = load_policy(section(Path(sys.argv[1])), device="cpu")
policy.acceleration.pack_weights(policy.model)
layers = {type(module).__name__ for module in policy.model.modules() if hasattr(module, "in_features")}
print(tokens_with_adapter(policy), layers)
print([name for name, module in sys.modules.items() if name.startswith("mmrl_ray.policy.cpu") and module])
"""


def tokens_with_adapter(policy: Policy) -> list[list[int]]:
    """Drawn and greedy ones, with an adapter that does something; scored, too."""
    with torch.no_grad():
        for parameter in add_adapter(policy, LoraSection(r=2), seed=3).parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    prompts = encode_prompts(policy, make_samples())
    sampling = SamplingParams(max_new_tokens=6, seed=5)
    requests = [DecodeRequest(prompt, 2, sampling, greedy_extra=True) for prompt in prompts]
    outputs = decode_groups(Decoder(policy), requests)
    completions = [[*output.completions, output.greedy] for output in outputs]
    drawn = [[c.token_ids for c in group if c is not None] for group in completions]
    with torch.no_grad():
        assert score_completions(policy, prompts, None, drawn, 1.0).logprobs.isfinite().all()
    return [ids.tolist() for group in drawn for ids in group]


def test_without_what_makes_a_cpu_faster_all_else_is_as_it_was(
    load: Load, family_folder: Callable[[str], Path]
) -> None:
    with_it = load()
    assert with_it.acceleration != Acceleration()
    command = [sys.executable, "-c", WITHOUT_CPU, str(family_folder("llava"))]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{tokens_with_adapter(with_it)} {{'Linear'}}", "[]"]
