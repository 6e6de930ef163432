"""Hidden states to log-probs against transformers: each model's own forward, and its own `generate` token by token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, LogitsProcessorList, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.utils import ModelOutput

from mmrl_ray.analysis.attribution import caption_importance
from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.logits import model_logits, takes_bare_head
from mmrl_ray.policy.lora.routing import RowAdapters
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import choose_path
from mmrl_ray.policy.prompts import PER_TOKEN, encode_prompts
from mmrl_ray.policy.scoring.collate import completion_positions, pad_prompts, prompt_positions
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import vision_features
from tests.support.tiny_models import FAMILIES, make_completions, make_samples
from tests.unit.policy.scoring.test_prefix import with_lora

Load = Callable[..., Policy]
TEMPERATURE = 0.7
CAPPED = ("granite_docling", "paligemma", "paligemma2")
"""Those that scale or cap their logits, or read their prompts both ways."""

TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "image_size": 32,
    "patch_size": 8,
}
ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
MODELS: dict[str, dict[str, Any]] = {
    "llava": {},
    "aya_vision": {"text": {"model_type": "cohere2", "logit_scale": 0.25}},
    "cohere_compass": {"text": {"logit_scale": 0.25, "layer_types": ["full_attention"] * 2, "rope_parameters": ROPE}},
    "gemma4": {"text": {"final_logit_softcapping": 2.0, "vocab_size_per_layer_input": 61}, "audio_config": None},
    "granite_docling": {
        "text": {"logits_scaling": 4.0},
        "vision": {"out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        "pad_token_id": 0,
    },
    "hyperclovax_vision_v2": {"text": {"logits_scaling": 3.0}, "vision": {"model_type": "qwen2_5_vl"}},
    "inkling_mm_model": {"text": {"moe_intermediate_size": 48, "n_routed_experts": 8}},
    "paligemma": {"text": {"model_type": "gemma2", "final_logit_softcapping": 2.0}},
}
"""Soft caps, and scales before the head and behind it; the first two do nothing of the kind."""


def tiny(kind: str, dtype: torch.dtype, facts: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Made of a config alone: no processor, no picture."""
    facts = dict(MODELS[kind] if facts is None else facts)
    vision = {**VISION, **facts.pop("vision", {})}
    if kind in ("paligemma", "aya_vision"):
        vision["model_type"] = "siglip_vision_model"
    config = CONFIG_MAPPING[kind](text_config={**TEXT, **facts.pop("text", {})}, vision_config=vision, **facts)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_gradients_are_those_of_the_models_own_forward(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind, dtype)
    tokens = torch.randint(20, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    bare = takes_bare_head(model, kind)
    assert bare == (kind in ("llava", "aya_vision"))
    expected = model(input_ids=tokens, use_cache=False).logits
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    got = model_logits(model, hidden, bare=bare)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    torch.testing.assert_close(model_logits(model, hidden.flatten(0, 1), bare=bare), expected.flatten(0, 1))
    head = model.get_output_embeddings()
    assert torch.equal(head(hidden), expected) == bare
    parameters = [head.weight, model.get_input_embeddings().weight]
    weights = torch.linspace(-1, 1, got.numel()).view_as(got)
    mine_and_theirs = [torch.autograd.grad((each * weights).sum(), parameters) for each in (got, expected)]
    for mine, theirs in zip(*mine_and_theirs, strict=True):
        assert theirs.norm() > 0
        torch.testing.assert_close(mine, theirs)


class _Mixing(LlavaForConditionalGeneration):
    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = output.logits - output.logits.mean(dim=1, keepdim=True)
        return output


class _LookingDeeper(LlavaForConditionalGeneration):
    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = output.logits + self.lm_head(output.hidden_states[-2])
        return output


class _Cutting(LlavaForConditionalGeneration):
    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = output.logits[..., :-1]
        return output


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_Mixing, r"what a _Mixing makes of one token's hidden state depends on its neighbours"),
        (_LookingDeeper, r"_LookingDeeper cannot be run from its hidden states on \(TypeError: 'NoneType'"),
        (_Cutting, r"a _Cutting gives logits of shape \[2, 3, 60\] for 2 x 3 tokens and a vocabulary of 61"),
    ],
)
def test_a_forward_whose_logits_cannot_be_made_of_hidden_states_is_refused(kind: Any, message: str) -> None:
    model = kind(tiny("llava", torch.float32).config)
    with pytest.raises(ModelError, match=f"^model 'owner/name': .*{message}"):
        takes_bare_head(model, "owner/name")


def test_a_model_without_a_core_of_its_own_is_refused() -> None:
    model = tiny("llava", torch.float32)
    with pytest.raises(ModelError, match="'owner/name': a LlavaModel is not a core with a head behind it"):
        takes_bare_head(model.base_model, "owner/name")


def forced(policy: Policy, prompt: EncodedPrompt, completion: torch.Tensor) -> torch.Tensor:
    """float64 [T]: `generate` on the one prompt, made to say the completion, by the raw logits of its steps."""
    accepted = inspect.signature(policy.hf_model.forward).parameters
    inputs = {n: v[None] if n in PER_TOKEN else v for n, v in prompt.model_inputs.items() if n in accepted}
    inputs.pop("labels", None)
    rows = prompt.input_ids[None]

    def say(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        following = completion[ids.shape[1] - rows.shape[1]]
        return torch.full_like(scores, -torch.inf).index_fill(1, following, 0.0)

    out = policy.hf_model.generate(
        input_ids=rows,
        attention_mask=torch.ones_like(rows),
        do_sample=False,
        max_new_tokens=len(completion),
        eos_token_id=None,
        pad_token_id=policy.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([say]),
        **inputs,
    )
    logits = torch.cat(out.logits).double() / TEMPERATURE
    logits[:, list(policy.image_token_ids)] = -torch.inf
    return logits.log_softmax(dim=-1).gather(1, completion[:, None])[:, 0]


def assert_close(mine: torch.Tensor, expected: torch.Tensor, way: str) -> None:
    torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-6, msg=lambda text: f"{way}: {text}")


@pytest.mark.parametrize("family", [*FAMILIES, *CAPPED])
def test_every_way_gives_the_log_probs_of_generate_token_by_token(family: str, load: Load) -> None:
    policy = load(family)
    assert policy.bare_head == (family not in ("granite_docling", "paligemma2"))
    prompts = encode_prompts(policy, make_samples())
    features = vision_features(policy, prompts)
    completions = make_completions(policy, ((3, 6), (5,), (1, 4)))
    expected = [[forced(policy, p, c) for c in group] for p, group in zip(prompts, completions, strict=True)]
    flat = torch.cat([each for group in expected for each in group])
    for path in ("naive", "shared_prefix", *(() if family == "paligemma2" else ("packed",))):
        scores = score_completions(policy, prompts, features, completions, TEMPERATURE, path=path)  # type: ignore[arg-type]
        assert_close(scores.logprobs[scores.mask], flat, path)
    hidden = score_completions(policy, prompts, features, completions, TEMPERATURE, path="naive", hidden=True)
    assert_close(hidden.logprobs[hidden.mask], flat, "hidden states")
    explained = caption_importance(policy, prompts[1], features[1], completions[1][0], temperature=TEMPERATURE)
    assert explained.loss == pytest.approx(-float(expected[1][0].sum()), rel=1e-5)
    sampling = SamplingParams(temperature=TEMPERATURE, max_new_tokens=5)
    for packed in (None, False):
        outs = decode_groups(Decoder(policy, packed=packed), [DecodeRequest(p, 2, sampling) for p in prompts])
        for prompt, out in zip(prompts, outs, strict=True):
            for said in out.completions:
                assert_close(said.logprobs, forced(policy, prompt, said.token_ids), "sampler")


@pytest.mark.parametrize("family", CAPPED)
def test_gradients_of_every_path_are_the_naive_ones(family: str, load: Load) -> None:
    policy = with_lora(load(family))
    prompts = encode_prompts(policy, make_samples()[1:])
    for wanted in ("shared_prefix", "packed"):
        choice = choose_path(policy, prompts, temperature=TEMPERATURE, wanted=wanted)  # type: ignore[arg-type]
        if (family, wanted) == ("paligemma2", "packed"):  # its core takes one mask for both kinds of layers
            assert choice.path == "naive"
            continue
        assert choice.path == wanted, choice.reason
        assert max(choice.wanted_gap.to_model, choice.wanted_gap.gradient or 1.0) <= 1e-5
        assert choice.inject_vision


def test_completions_are_no_part_of_a_two_way_prompt_or_picture(load: Load) -> None:
    policy = load("paligemma")
    batch = pad_prompts(policy, encode_prompts(policy, make_samples()))
    (types,) = batch.per_token_with(2).values()
    assert types[:, :-2].eq(0).all()
    assert types[:, -2:].eq(1).all(), "the causal suffix"
    policy = load("gemma3")
    [prompt] = encode_prompts(policy, make_samples()[:1])
    # As a template would have it that puts the picture last.
    end = int((prompt.input_ids == policy.placeholder_id).nonzero().max()) + 1
    prompt = EncodedPrompt(
        prompt.input_ids[:end],
        {n: v[:end] if n in PER_TOKEN else v for n, v in prompt.model_inputs.items()},
        prompt.image_key,
    )
    [[completion]] = completions = make_completions(policy, [(4,)])
    expected = forced(policy, prompt, completion)
    for path in ("naive", "shared_prefix", "packed"):
        scores = score_completions(policy, [prompt], None, completions, TEMPERATURE, path=path)  # type: ignore[arg-type]
        assert_close(scores.logprobs[0], expected, path)


def test_rows_of_several_adapters_share_a_capped_head(load: Load) -> None:
    """LoRA on `lm_head` itself, before the cap: PEFT has to tell the rows apart there, too."""
    policy = load("paligemma2")
    head = policy.hf_model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # no longer the embeddings'
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    torch.manual_seed(0)
    policy.model = get_peft_model(policy.hf_model, config, adapter_name="one").eval()
    policy.model.add_adapter("other", config)
    prompts = encode_prompts(policy, make_samples()[:2])
    sampling = SamplingParams(temperature=TEMPERATURE, max_new_tokens=4)
    names = ("one", "other")

    def decoded(chosen: tuple[int, ...]) -> list[Any]:
        decoder = Decoder(policy, adapters=RowAdapters(policy))
        handles = [decoder.admit(prompts[i], 2, sampling, adapter=names[i]) for i in chosen]
        decoder.drain()
        return [decoder.take(handle) for handle in handles]

    together, alone = decoded((0, 1)), [*decoded((0,)), *decoded((1,))]
    for mine, theirs in zip(together, alone, strict=True):
        for said, expected in zip(mine.completions, theirs.completions, strict=True):
            assert said.token_ids.tolist() == expected.token_ids.tolist()
            assert_close(said.logprobs, expected.logprobs.double(), "shared pass")


@pytest.mark.parametrize("axes", [3, 4])
def test_positions_are_those_that_generate_prepares(axes: int) -> None:
    """HunYuan-VL, which counts on as many axes as its config has sections for, by a grid with row ends."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1] * axes}
    config = CONFIG_MAPPING["hunyuan_vl"](
        text_config={**TEXT, "head_dim": 2 * axes, "rope_parameters": rope},
        vision_config={**VISION, "out_hidden_size": 32, "text_hidden_size": 32},
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    policy: Any = SimpleNamespace(core=model.base_model, hf_model=model)
    merged = model.config.vision_config.spatial_merge_size
    image = (4 // merged) * (6 // merged + 1)
    prompts, expected, after = [], [], []
    for before, length in ((3, image + 9), (3, image + 7)):
        tokens = torch.arange(30, 30 + length)
        types = torch.zeros_like(tokens)
        types[before : before + image] = 1
        grid = torch.tensor([[1, 4, 6]])
        inputs = {
            "mm_token_type_ids": types[None],
            "image_grid_thw": grid,
            "attention_mask": torch.ones_like(tokens)[None],
        }
        made = model._prepare_position_ids_for_generation(tokens[None], inputs)
        expected.append(made[-axes:, 0])
        after.append(model._update_model_kwargs_for_generation(ModelOutput(), {"position_ids": made}, False))
        prompts.append(EncodedPrompt(tokens, {"mm_token_type_ids": types, "image_grid_thw": grid}, ""))
    mask = torch.ones(2, image + 9, dtype=torch.int64)
    mask[1, :2] = 0
    positions, following = prompt_positions(policy, prompts, mask)
    assert torch.equal(positions[:, 0], expected[0])
    assert torch.equal(positions[:, 1, 2:], expected[1])
    next_one = completion_positions(policy, following, 1)
    for row in range(2):
        assert torch.equal(next_one[:, row], after[row]["position_ids"][-axes:, 0, -1:])
