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
from mmrl_ray.config.sections import LoraSection, ModelSection, ResourcesSection, RolloutsSection
from mmrl_ray.config.sft import SftSection
from mmrl_ray.planning.estimate import (
    PROCESS,
    batch_plan,
    engine_memory,
    learner_memory,
    loading_memory,
    rollout_memory,
    warm_start_memory,
)
from mmrl_ray.policy import memory
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_parameters, add_adapter
from mmrl_ray.policy.memory import DecodeLimits, model_shape
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


def test_vllms_estimate_by_hand(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    plain = load_policy(ModelSection(path=policy.path, dtype="float32"), device="cpu")
    shape = model_shape(plain.hf_model, LoraSection(r=4), torch.float32)
    own = config(groups_per_assignment=4)
    assert engine_memory(own, shape, 70, context=512) == {}
    a_token = 2 * 128 * 4 * 4  # keys and values, width, layers, bytes

    def parts(context: int = 512, *, embeds: bool = True, **engine: Any) -> dict[str, int]:
        cfg = config(groups_per_assignment=4, engine={"kind": "vllm", **engine})
        return dict(engine_memory(cfg, shape, 70, context=context, embeds=embeds, memory_bytes=8 << 30))

    found = parts()
    assert found["keys and values"] == (16 * 512 + 32) * a_token  # every completion at its longest, and a spare block
    assert found["weights"] == 4 * shape.language_parameters < shape.weight_bytes == parts(embeds=False)["weights"]
    layer = 4 * (128 + 128) + 3 * (128 + 384)  # in and out of q, k, v, o and of the MLP's three
    assert found["adapters"] == 2 * 8 * 4 * layer * 4 + 2 * shape.adapter_parameters * 8  # ranks are padded to 8
    assert parts(dtype="bfloat16")["keys and values"] == found["keys and values"] // 2
    # A context that nothing was made for: within 1 GiB, unless somebody asks for more.
    assert parts(1 << 20)["keys and values"] <= 1 << 30 < parts(max_model_len=1 << 19)["keys and values"]
    assert parts(args={"kv_cache_memory_bytes": 5 << 30})["keys and values"] == 5 << 30
    assert sum(parts(gpu_memory_utilization=0.5).values()) == 4 << 30
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert parts()["keys and values"] == 3 << 30


def on_gpus(cfg: Config) -> Config:
    share = {"cpus": 1, "gpus": 1}
    resources = {"learner": share, "rollout": share, "placement": "split"}
    return cfg.model_copy(update={"resources": ResourcesSection.model_validate(resources)})


@pytest.mark.parametrize(("gpu", "rows"), [(1.2, 61), (2.0, 141), (80.0, 1024), (None, 1024)])
def test_a_gpu_holds_the_rows_that_the_decode_loop_takes_there(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, gpu: float | None, rows: int
) -> None:
    """Of 1,200: with so many GiB as many as the worker itself finds out, and on a GPU unknown as many as on any."""
    plain = load_policy(ModelSection(path=policy.path, dtype="float32"), device="cpu")
    shape = model_shape(plain.hf_model, LoraSection(r=4), torch.float32)
    learner = {"groups_per_step": 300, "kl": {"weight": 0.0}}
    cfg = on_gpus(config(learner, groups_per_assignment=300))
    total = None if gpu is None else int(gpu * 2**30)
    parts = rollout_memory(cfg, shape, 70, 64, gpu_bytes=total)
    a_token = 2 * 128 * 4 * 4
    if total is not None:
        free = total - sum(parts[name] for name in ("process", "weights", "adapter"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
        found = DecodeLimits.of(replace(plain, device=torch.device("cuda")), 16)
        assert found.max_rows == rows
        assert found.prefill_tokens * a_token < free
    assert parts["keys and values"] == rows // 4 * (70 + 4 * 16) * a_token
    assert rollout_memory(config(learner, groups_per_assignment=300), shape, 70, 64)["keys and values"] == (
        256 // 4 * (70 + 4 * 16) * a_token
    )


def test_the_reference_holds_the_keys_of_as_many_groups_as_it_scores_together(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_policy(ModelSection(path=policy.path, dtype="float32"), device="cpu")
    shape = replace(model_shape(plain.hf_model, LoraSection(r=4), torch.float32), vocabulary=50)
    a_token = 2 * 128 * 4 * 4
    # A completion's last token has no key: three groups of 4 × (70 + 15) fit, and four do not.
    monkeypatch.setattr(memory, "MOST_KEYS_BYTES", int(3.5 * 4 * 85 * a_token))
    parts = rollout_memory(config(groups_per_assignment=6), shape, 70, 64)
    assert parts["keys and values"] == (3 * 70 + 3 * 4 * (70 + 16)) * a_token


def test_host_memory_loses_some_to_fragments(policy: Policy) -> None:
    plain = load_policy(ModelSection(path=policy.path, dtype="float32"), device="cpu")
    shape = model_shape(plain.hf_model, LoraSection(r=4), torch.float32)
    cfg = config()
    parts = learner_memory(cfg, shape, batch_plan(cfg, 70), 70, 64)
    assert parts["fragments"] == int(0.4 * (parts["activations"] + parts["repeated prefix"] + parts["logits"]))
    assert "fragments" not in learner_memory(on_gpus(cfg), shape, batch_plan(cfg, 70), 70, 64)


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
        assert loading_memory(cfg, shape) == PROCESS + rest + layers // parts + layers // shape.layers
    cfg = config({"sharding": "fsdp2", "workers": 1})
    assert learner_memory(cfg, shape, batch_plan(cfg, 50), 50, 16)["weights"] == shape.weight_bytes
    assert loading_memory(cfg, shape) == PROCESS + shape.weight_bytes


def test_whole_bases_go_to_gpus_tensor_by_tensor(policy: Policy) -> None:
    plain = load_policy(ModelSection(path=policy.path, dtype="float32"), device="cpu")
    shape = model_shape(plain.hf_model, LoraSection(r=4), torch.float32)
    cfg = config({"workers": 4})
    share = cfg.resources.learner.model_copy(update={"gpus": 1.0})
    cfg = cfg.model_copy(update={"resources": cfg.resources.model_copy(update={"learner": share})})
    text = plain.hf_model.get_input_embeddings().weight, plain.hf_model.get_output_embeddings().weight
    assert loading_memory(cfg, shape) == PROCESS + sum(weight.nbytes for weight in text)


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
    assert parts["fragments"] == int(0.4 * (parts["activations"] + parts["repeated prefix"] + parts["logits"]))
    short = warm_start_memory(full, shape, 70, 64, images=3, caption_tokens=10)
    # Now two images of 70 + 2 * 10 tokens each are a micro-batch.
    assert short["activations"] * 102 == parts["activations"] * 2 * 90
    assert short["vision features"] == (2 + 3) * 64 * 128 * 4
    lora = cfg.model_copy(update={"sft": SftSection(steps=20, batch_size=6, captions_per_image=2, mode="lora")})
    assert warm_start_memory(lora, shape, 70, 64)["gradients, AdamW"] == 16 * shape.adapter_parameters
    assert warm_start_memory(cfg, shape, 70, 64) == {}
