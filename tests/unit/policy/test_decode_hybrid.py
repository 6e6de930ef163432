"""Decoding a model whose cache holds recurrent states (Qwen3.5: linear attention beside full attention)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config, Qwen3_5TextConfig, Qwen3_5VisionConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from mmrl_ray.config.model import ModelSection
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.load import Policy, load_policy
from mmrl_ray.policy.prefix import score_completions
from mmrl_ray.policy.processors import NoVideo, stills_only
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import vision_features
from tests.support import tiny_models


def build(folder: Path) -> None:
    tokenizer = tiny_models._tokenizer(tiny_models._QWEN_NAMED)
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}, patch_size=16)
    template = tiny_models._template(tiny_models._QWEN_IMAGE)
    processor = stills_only(Qwen3VLProcessor)(images, tokenizer, NoVideo(), chat_template=template)
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    }
    text = Qwen3_5TextConfig(
        **tiny_models._TEXT,
        **tiny_models._text_ids(tokenizer),
        head_dim=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
        rope_parameters=rope,
    )
    vision = Qwen3_5VisionConfig(
        hidden_size=32, intermediate_size=48, num_heads=4, depth=2, out_hidden_size=32, num_position_embeddings=64
    )
    config = Qwen3_5Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), **tiny_models._qwen_ids(tokenizer)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3_5ForConditionalGeneration(config)
        tiny_models._spread(model)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    build(tmp_path)
    return load_policy(ModelSection(path=str(tmp_path), dtype="float32"), device="cpu")


def test_rows_of_a_recurrent_model_decode_in_cohorts_of_their_own(policy: Policy) -> None:
    policy.eos_token_ids = (*policy.eos_token_ids, *range(policy.vocab_size - 6, policy.vocab_size))
    prompts = encode_prompts(policy, tiny_models.make_samples())
    sampling = SamplingParams(temperature=1.3, max_new_tokens=12)
    decoder = Decoder(policy)
    outs = decode_groups(decoder, [DecodeRequest(prompt, 6, sampling) for prompt in prompts])
    assert decoder.counters["unmerged_rows"] == decoder.counters["rows"] == 18
    assert decoder.counters["compactions"] > 0
    completions = [[c.token_ids for c in out.completions] for out in outs]
    with torch.no_grad():
        scores = score_completions(policy, prompts, vision_features(policy, prompts), completions, 1.3, path="naive")
    flat = [completion for out in outs for completion in out.completions]
    for i, completion in enumerate(flat):
        torch.testing.assert_close(completion.logprobs, scores.logprobs[i][scores.mask[i]], rtol=0, atol=1e-5)
    alone = decode_groups(Decoder(policy), [DecodeRequest(prompts[1], 6, sampling)])[0]
    assert [c.token_ids.tolist() for c in alone.completions] == [t.tolist() for t in completions[1]]
