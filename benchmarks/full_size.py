"""Kernels and bytes of a training step at full size, counted without weights and without a GPU.

    python benchmarks/full_size.py configs/qwen2.5-vl-3b-coco.yaml [--layers 36] [--device cuda]

A model in the shape of Qwen2.5-VL-3B is made of fake tensors (`tests/support/counted.py`): a decode step of one
assignment, and one update over a micro-batch as large as the config lets it be. All layers do the same but the last,
so two short models are counted and what a further layer adds is added. `--device` names whose acceleration the model
gets (`mmrl_ray/policy/<device>.py`).

Prints lines; the last one is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests.support

from mmrl_ray.config import Config
from mmrl_ray.config.load import load_config
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams, VisionFeatures
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.policy.generation.decode import Decoder
from mmrl_ray.policy.lora.adapter import add_adapter, reference_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.packed import checkpoint_layers
from mmrl_ray.policy.scoring.prefix import ScorePath, score_completions
from tests.support import qwen_3b
from tests.support.counted import Counted, fake, fake_tensor

GIB = 2**30
_COUNTED = (2, 3)
"""Layers of the two models."""
PICTURE = {"width": 644, "height": 476}
"""Of 391 tokens: a photograph of COCO."""


def make(cfg: Config, sizes: dict[str, dict[str, int]], device: str) -> tuple[Policy, EncodedPrompt, VisionFeatures]:
    """A fake policy with its adapter, a prompt, and the prompt's features."""
    policy = qwen_3b.make_policy("meta", torch.bfloat16, sizes, accelerated_for=device)
    add_adapter(policy, cfg.model.lora, 0)
    if cfg.learner.gradient_checkpointing:
        checkpoint_layers(policy)
    fake(policy)
    (prompt,) = encode_prompts(policy, qwen_3b.samples(1, **PICTURE))
    tokens = int((prompt.input_ids == policy.placeholder_id).sum())
    return policy, prompt, VisionFeatures(fake_tensor((tokens, policy.hidden_size), policy.dtype))


def decode_step(
    policy: Policy,
    prompt: EncodedPrompt,
    features: VisionFeatures,
    groups: int,
    cfg: Config,
    *,
    without_adapter: bool,
) -> dict[str, int]:
    """Of `groups` × G rows: kernels of one token each, and the bytes that came on top of what was there."""
    with Counted() as counted, reference_policy(policy.model) if without_adapter else nullcontext():
        decoder = Decoder(policy)
        for seed in range(groups):
            sampling = SamplingParams(max_new_tokens=cfg.rollout.max_new_tokens, seed=seed)
            decoder.admit(prompt, cfg.rollout.group_size, sampling, features=features)
        decoder.step()  # the prompts
        prefill = counted.peak_bytes
        decoder.step()
        counted.restart()
        decoder.step()
        return {"kernels": counted.kernels, "prefill_bytes": prefill, "step_bytes": counted.peak_bytes}


def learner_step(policy: Policy, prompt: EncodedPrompt, features: VisionFeatures, cfg: Config) -> dict[str, int]:
    """One update over as many groups as one micro-batch takes: kernels, what a forward pass keeps for its backward
    pass, and the peak beside the weights, optimiser and gradients included."""
    size, tokens = cfg.rollout.group_size, cfg.rollout.max_new_tokens
    path: ScorePath = "packed" if cfg.learner.wants_packed_rows else "shared_prefix"
    count = groups_of_a_micro_batch(prompt, cfg)
    (sample,) = qwen_3b.samples(1, **PICTURE)
    groups = qwen_3b.groups_of(sample, [prompt] * count, features, size=size, tokens=tokens)
    plan = qwen_3b.plan_of(groups, cfg.learner)
    with Counted() as forward, autocast():
        completions = [[c.token_ids for c in group.completions] for group in groups]
        scores = score_completions(policy, [prompt] * count, [features] * count, completions, 1.0, path=path)
        kept = forward.live_bytes
    del scores
    with Counted() as counted, mock.patch.object(LearnerStep, "_autocast", return_value=autocast()):
        learner = LearnerStep(policy, cfg.learner, path=path)
        learner.run(plan, lambda planned: [group.payload for group in planned])
        return {"kernels": counted.kernels, "kept_bytes": kept, "peak_bytes": counted.peak_bytes}


def groups_of_a_micro_batch(prompt: EncodedPrompt, cfg: Config) -> int:
    """At least one."""
    each = prompt.input_ids.numel() + cfg.rollout.group_size * cfg.rollout.max_new_tokens
    return max(1, cfg.learner.micro_batch_tokens // each)


def autocast() -> Any:
    """The learner's, which asks for a device that is not here."""
    return torch.autocast("cpu", torch.bfloat16)


def count(cfg: Config, layers: int, device: str) -> dict[str, dict[str, int]]:
    """All figures of a model of so many layers."""
    policy, prompt, features = make(cfg, {"text": {"num_hidden_layers": layers}}, device)
    found = {"weights": {"bytes": sum(p.nbytes for p in policy.model.parameters())}}
    groups = cfg.rollout.groups_per_assignment
    for name, without in (("decode step", False), ("decode step without adapter", True)):
        found[name] = decode_step(policy, prompt, features, groups, cfg, without_adapter=without)
    return {**found, "learner": learner_step(policy, prompt, features, cfg)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--device", default="cuda", help="meta for none")
    given = parser.parse_args()
    cfg = load_config(given.config)
    few, more = (count(cfg, layers, given.device) for layers in _COUNTED)
    found = {
        name: {key: value + (given.layers - _COUNTED[0]) * (more[name][key] - value) for key, value in figures.items()}
        for name, figures in few.items()
    }
    for name, figures in found.items():
        print(told(name, figures))
    print(json.dumps({"layers": given.layers, **found}))


def told(name: str, figures: dict[str, int]) -> str:
    """One line."""
    parts = [
        f"{key.removesuffix('_bytes')} {value / GIB:.2f} GiB" if key.endswith("_bytes") else f"{key} {value:,}"
        for key, value in figures.items()
    ]
    return f"{name:32} {', '.join(parts)}"


if __name__ == "__main__":
    main()
