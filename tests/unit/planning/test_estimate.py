"""The memory estimate against published sizes and against what autograd really keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, SmolVLMConfig

from mmrl_ray.algorithms.ilql import IlqlSection
from mmrl_ray.config import Config
from mmrl_ray.config.sections import LoraSection, ModelSection, RolloutsSection, SftSection
from mmrl_ray.planning.estimate import batch_plan, learner_memory, rollout_memory, warm_start_memory
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_parameters, add_adapter
from mmrl_ray.policy.memory import model_shape
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.packed import checkpoint_layers
from mmrl_ray.policy.scoring.prefix import ScorePath, score_completions
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.policy.vision import vision_features
from tests.support import qwen_3b
from tests.support.tiny_models import WORDS, make_samples

QWEN_3B = qwen_3b.config()
SMOLVLM_256M = SmolVLMConfig(
    text_config={
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49280,
    },
    vision_config={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
    scale_factor=4,
    tie_word_embeddings=False,
)


def config(learner_keys: dict[str, Any] | None = None, **rollout: Any) -> Config:
    learner = {"steps": 2, "groups_per_step": 6, "micro_batch_tokens": 10**9, **(learner_keys or {})}
    return Config.model_validate(
        {
            "run": {"name": "x"},
            "model": {"path": "x"},
            "data": {"train": "x"},
            "rollout": {"group_size": 4, "max_new_tokens": 16, **rollout},
            "learner": learner,
        }
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    # The totals that the checkpoints' own safetensors headers give.
    [("QWEN_3B", 3_754_622_976), ("SMOLVLM_256M", 256_484_928)],
)
def test_parameters_of_the_shipped_models(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(globals()[name], dtype=torch.bfloat16)
    shape = model_shape(model, LoraSection(r=16), torch.bfloat16)
    assert shape.parameters == parameters
    assert shape.weight_bytes == 2 * parameters
    assert shape.adapted_layers == 7 * shape.layers  # q, k, v, o, gate, up, down


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder: Path = tmp_path_factory.mktemp("model")
    build_tiny_llava(folder, vocabulary=WORDS, image_size=64)
    return with_adapter(str(folder))


def with_adapter(folder: str) -> Policy:
    made = load_policy(ModelSection(path=folder, dtype="float32"), device="cpu")
    add_adapter(made, LoraSection(r=4), 0)
    return made


def test_adapter_size_is_pefts(policy: Policy, tmp_path: Path) -> None:
    plain = load_policy(ModelSection(path=policy.path, dtype="float32"), device="cpu")
    shape = model_shape(plain.hf_model, LoraSection(r=4), torch.float32)
    assert shape.adapter_parameters == sum(p.numel() for p in adapter_parameters(policy.model))
    assert shape.parameters == sum(p.numel() for p in plain.hf_model.parameters())


@pytest.mark.parametrize(("group_size", "tokens", "checkpointing"), [(2, 24, False), (8, 12, False), (8, 12, True)])
def test_learner_estimate_is_near_what_autograd_keeps(
    policy: Policy, group_size: int, tokens: int, checkpointing: bool
) -> None:
    """Counts the storages that a real forward pass saves for its backward pass."""
    cfg = config({"gradient_checkpointing": checkpointing}, group_size=group_size, max_new_tokens=tokens)
    path: ScorePath = "shared_prefix"
    if checkpointing:
        policy, path = with_adapter(policy.path), "packed"
        checkpoint_layers(policy)
    samples = [replace(s, id=str(i)) for i, s in enumerate(make_samples(((64, 64),) * 6))]
    prompts = encode_prompts(policy, samples)
    features = vision_features(policy, prompts)
    generator = torch.Generator().manual_seed(0)
    completions = [[torch.randint(5, 20, (tokens,), generator=generator) for _ in range(group_size)] for _ in prompts]
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        score_completions(policy, prompts, features, completions, 1.0, path=path)
    measured = sum(storage.nbytes() for storage in kept.values())

    plain = load_policy(ModelSection(path=policy.path, dtype="float32"), device="cpu")
    shape = model_shape(plain.hf_model, LoraSection(r=4), torch.float32)
    length = prompts[0].input_ids.numel()
    parts = learner_memory(cfg, shape, batch_plan(cfg, length), length, 64)
    estimated = sum(parts[name] for name in ("activations", "masks", "repeated prefix"))
    if checkpointing:  # the one layer that is made again was not yet
        estimated -= parts["activations"] - batch_plan(cfg, length).micro_batch_tokens * shape.layers * shape.hidden * 4
    assert 0.85 < estimated / measured < 1.15


def test_rollout_estimate_by_hand(policy: Policy) -> None:
    plain = load_policy(ModelSection(path=policy.path, dtype="float32"), device="cpu")
    shape = replace(model_shape(plain.hf_model, LoraSection(r=4), torch.float32), vocabulary=50)
    cfg = config(groups_per_assignment=4, vision_cache_mb=1)
    parts = rollout_memory(cfg, shape, 70, 64)
    rows = 4 * 4  # groups of an assignment × completions
    # grpo's KL has the reference score every token, on a copy of its prompt's keys for each completion beside that one.
    a_token = 2 * 128 * 4 * 4  # keys and values, width, layers, bytes
    assert parts["keys and values"] == (4 * 70 + rows * (70 + 16)) * a_token
    # Per layer: q, k, v, o of 128 × 128 and three of 128 × 384, once more as merged; r = 4 on both sides of each.
    adapted, adapter = 4 * (4 * 128 * 128 + 3 * 128 * 384), 4 * 4 * (4 * 2 * 128 + 3 * (128 + 384))
    assert parts["adapter"] == 4 * (adapted + adapter)
    assert parts["activations or logits"] == 4 * 70 * (3 * 384 + 6 * 128) * 4  # of the prompts in one layer
    assert parts["vision features"] == 4 * 64 * 128 * 4 + 2**20
    assert "picture processes" not in parts
    written = {**cfg.model_dump(exclude_unset=True), "resources": {"rollout": {"picture_processes": 3}}}
    beside = rollout_memory(Config.model_validate(written), shape, 70, 64)
    assert beside["picture processes"] == 3 * 400 * 2**20
    few = rollout_memory(cfg, shape, 70, 64, images=3)
    assert few["vision features"] == (4 + 3) * 64 * 128 * 4


def test_batch_plan_by_hand() -> None:
    cfg = config()
    cfg = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"micro_batch_tokens": 300, "workers": 2})})
    plan = batch_plan(cfg, 70)
    # A group is 70 + 4 × 16 = 134 tokens: two fit into 300. Six groups over two ranks: three each, as 2 + 1.
    assert plan.completions == 24
    assert plan.micro_batches == (2, 2)
    assert (plan.micro_batch_groups, plan.micro_batch_tokens) == (2, 268)
    assert plan.step_tokens == 6 * 134
    assert plan.naive_tokens == 24 * 86
    assert plan.assignments == 1


def test_sharding_leaves_a_learner_its_part_of_the_layers(policy: Policy) -> None:
    plain = load_policy(ModelSection(path=policy.path, dtype="float32"), device="cpu")
    shape = model_shape(plain.hf_model, LoraSection(r=4), torch.float32)
    layers = sum(p.numel() * 4 for layer in plain.decoder.layers for p in layer.parameters())  # type: ignore[union-attr]
    assert shape.layer_bytes == layers
    rest = shape.weight_bytes - layers
    for workers, parts in ((4, 4), ({"min": 2, "max": 4}, 2)):
        cfg = config({"sharding": "fsdp2", "workers": workers})
        weights = learner_memory(cfg, shape, batch_plan(cfg, 50), 50, 16)["weights"]
        assert weights == rest + layers // parts + 2 * layers // shape.layers
    cfg = config({"sharding": "fsdp2", "workers": 1})
    assert learner_memory(cfg, shape, batch_plan(cfg, 50), 50, 16)["weights"] == shape.weight_bytes


def test_value_heads_count_with_what_their_optimiser_keeps(policy: Policy) -> None:
    plain = load_policy(ModelSection(path=policy.path, dtype="float32"), device="cpu")
    shape = replace(model_shape(plain.hf_model, LoraSection(r=4), torch.float32), vocabulary=150_000)
    base = config({"advantage": "none", "kl": {"weight": 0.0}})
    data = base.data.model_copy(update={"rollouts": RolloutsSection(run="runs/again")})
    learner = base.learner.model_copy(update={"loss": "ilql", "ilql": IlqlSection(width=300)})
    cfg = base.model_copy(update={"learner": learner, "data": data})
    head = 300 * (shape.hidden + 150_000) * 4
    plan = batch_plan(cfg, 50)
    parts = learner_memory(cfg, shape, plan, 50, 16)
    assert parts["value heads"] == 10 * head + parts["logits"]
    parts = rollout_memory(cfg, shape, 50, 16)
    assert parts["value heads"] == 2 * head + 6 * 4 * 150_000 * 4 * 5  # rows, and copies of what is made of their Q
    assert "value heads" not in learner_memory(base, shape, plan, 50, 16)


def test_a_warm_start_keeps_a_gradient_and_two_moments_of_all_that_trains(policy: Policy) -> None:
    plain = load_policy(ModelSection(path=policy.path, dtype="float32"), device="cpu")
    shape = model_shape(plain.hf_model, LoraSection(r=4), torch.float32)
    language = {id(p): p.numel() for part in (plain.decoder, plain.hf_model.lm_head) for p in part.parameters()}
    cfg = config({"micro_batch_tokens": 200}, vision_cache_mb=1)
    full = cfg.model_copy(update={"sft": SftSection(steps=20, batch_size=6, captions_per_image=2)})
    parts = warm_start_memory(full, shape, 70, 64)
    assert parts["weights"] == 4 * shape.parameters
    assert parts["gradients, AdamW"] == 12 * sum(language.values()) < 12 * shape.parameters
    # An image with its two captions is 70 + 2 * 16 = 102 tokens: one makes a micro-batch of at most 200.
    assert parts["activations"] == 102 * 4 * (4 * (2 * 128 + 4 * 128 + 3 * 384) + 4 * (2 * 128 + 384))
    assert parts["vision features"] == 64 * 128 * 4 + 2**20
    lora = cfg.model_copy(update={"sft": SftSection(steps=20, batch_size=6, captions_per_image=2, mode="lora")})
    assert warm_start_memory(lora, shape, 70, 64)["gradients, AdamW"] == 16 * shape.adapter_parameters
    assert warm_start_memory(cfg, shape, 70, 64) == {}
