"""GRPO on one screen: a tiny vision-language model learns to say all that it sees, in one process and without Ray.

    scenes ──▶ warm start (supervised; half of the captions say too little)
                 └▶ every step: sample G captions an image ──▶ score them ──▶ advantages ──▶ clipped loss ──▶ AdamW

`mmrl train` does the same with many processes, checkpoints, a report and every check that is left out here.

    python examples/grpo_on_one_screen.py                              about a minute and a half on one core
    python examples/grpo_on_one_screen.py --warm-steps 4 --steps 2     shows that it runs
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import replace

import torch

from mmrl_ray.config.sections import LoraSection, ModelSection, ScenesSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.data.scenes.generator import generate_scenes, scenes_vocabulary
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.losses.advantages import advantages
from mmrl_ray.losses.aggregation import completion_scales
from mmrl_ray.losses.policy_gradient import policy_loss
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, GroupOutput, decode_groups
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_parameters, add_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_caption, encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.policy.vision import vision_features
from mmrl_ray.rewards.captioning import CaptionReward

IMAGES, GROUP, TOKENS = 16, 8, 16  # images a step, captions an image (G), tokens a caption at most (T)


def make_policy(folder: str) -> Policy:
    """An untrained LLaVA of about half a million parameters that reads pictures of 32 × 32 pixels as 16 tokens."""
    words = ["describe", "the", "image", ".", *scenes_vocabulary()]
    build_tiny_llava(folder, vocabulary=words, image_size=32, hidden=96, layers=3, vision_layers=2, heads=4,
                     initializer_range=0.1)  # fmt: skip
    return load_policy(ModelSection(path=folder, dtype="float32"), device="cpu")


def warm_start(policy: Policy, train: list[Sample], steps: int) -> None:
    """Cross-entropy on captions of which half leave out size or place, with the vision tower learning, too."""
    policy.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2))
    rng = random.Random(0)
    for _ in range(steps):
        samples = rng.sample(train, 64)
        prompts = encode_prompts(policy, samples)
        texts = [rng.choice([rng.choice(s.metadata["partial"]), rng.choice(s.references)]) for s in samples]
        captions = [[encode_caption(policy, text)] for text in texts]
        scores = score_completions(policy, prompts, vision_features(policy, prompts), captions, 1.0)
        loss = -scores.logprobs.sum() / scores.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    policy.model.requires_grad_(False)


def sample_captions(policy: Policy, samples: list[Sample], seed: int, *, greedy: bool = False) -> list[GroupOutput]:
    """G captions of each image (one where greedy), with the log-probs they were drawn with."""
    prompts = encode_prompts(policy, samples)
    requests = [
        DecodeRequest(p, 1 if greedy else GROUP, SamplingParams(max_new_tokens=TOKENS, greedy=greedy, seed=seed + i))
        for i, p in enumerate(prompts)
    ]
    with torch.no_grad():
        return decode_groups(Decoder(policy), requests)


def rewards_of(reward: CaptionReward, samples: list[Sample], outputs: list[GroupOutput]) -> torch.Tensor:
    """Rewards [images, captions]."""
    return torch.tensor([
        [r.total for r in reward.score_batch([s] * len(o.completions), [c.caption for c in o.completions])]
        for s, o in zip(samples, outputs, strict=True)
    ])  # fmt: skip


def held_out(policy: Policy, reward: CaptionReward, samples: list[Sample]) -> tuple[float, str]:
    """Mean reward of the greedy captions, and the first one."""
    outputs = sample_captions(policy, samples, 0, greedy=True)
    return float(rewards_of(reward, samples, outputs).mean()), outputs[0].completions[0].text


def grpo_step(policy: Policy, optimizer: torch.optim.Optimizer, reward: CaptionReward, samples: list[Sample],
              seed: int) -> float:  # fmt: skip
    """One optimiser step; returns the mean reward of what was sampled."""
    outputs = sample_captions(policy, samples, seed)
    rewards = rewards_of(reward, samples, outputs)
    completions = [c for output in outputs for c in output.completions]
    scales, denominator = completion_scales("sequence_mean", [c.token_ids.numel() for c in completions])
    prompts = encode_prompts(policy, samples)
    tokens = [[c.token_ids for c in output.completions] for output in outputs]
    scores = score_completions(policy, prompts, vision_features(policy, prompts), tokens, temperature=1.0)
    behaviour = torch.nn.utils.rnn.pad_sequence([c.logprobs for c in completions], batch_first=True)
    loss = policy_loss(
        "clipped", scores.logprobs, None, behaviour, advantages("group", rewards).flatten(), scores.mask,
        scales=scales.float(), denominator=denominator, off_policy_cap=2.0, clip_low=0.2, clip_high=0.2,
    ).loss  # fmt: skip
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(rewards.mean())


def main() -> None:
    """Warm start, then GRPO; the held-out reward before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    began = time.monotonic()
    scenes, evaluation = generate_scenes(ScenesSection(train=1000, eval=100, image_size=32, max_objects=1))
    train, evaluation = ([replace(s, prompt="describe the image .") for s in split] for split in (scenes, evaluation))
    idf = CorpusStatistics.from_references(sample.references for sample in train).idf
    reward = CaptionReward(alpha=0.5, beta=0.5, gamma=0.1, idf=idf, max_words=30)
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy(folder)
        warm_start(policy, train, arguments.warm_steps)
        before, said = held_out(policy, reward, evaluation)
        print(f"held-out reward after the warm start {before:.3f}, e.g. {said!r} ({time.monotonic() - began:.0f} s)")
        add_adapter(policy, LoraSection(r=8, alpha=16), seed=0)
        optimizer = torch.optim.AdamW(adapter_parameters(policy.model), lr=3e-3)
        rng = random.Random(1)
        for step in range(arguments.steps):
            mean = grpo_step(policy, optimizer, reward, rng.sample(train, IMAGES), seed=1000 * step)
            if step % 5 == 0:
                print(f"step {step:3d}  mean reward {mean:.3f}  ({time.monotonic() - began:.0f} s)", flush=True)
        after, said = held_out(policy, reward, evaluation)
    print(f"held-out reward {before:.3f} -> {after:.3f}, e.g. {said!r} ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
