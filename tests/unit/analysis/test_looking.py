"""A policy that looks and one that does not: both figures that tell them apart, on what each of them says itself."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmrl_ray.analysis.attribution import Importance, caption_importance, caption_states
from mmrl_ray.analysis.correlation import Correlation, correlations
from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_caption, encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.policy.vision import vision_features

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30)}
PROMPTS = ("describe it .", "what is it ?")
SAMPLES, PROBED, STEPS = 80, 12, 120


@dataclass
class Look:
    right: int
    """Captions that name the colour."""
    importance: list[Importance]
    correlations: dict[str, Correlation]

    def share(self, modality: str) -> float:
        return float(np.mean([each.share[modality] for each in self.importance]))


def pictures(count: int, seed: int) -> tuple[list[str], list[Sample]]:
    rng = np.random.default_rng(seed)
    colours = [str(rng.choice(list(COLOURS))) for _ in range(count)]
    samples = []
    for i, colour in enumerate(colours):
        pixels = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 25, (24, 24, 3)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        samples.append(Sample(f"{i}", (buffer.getvalue(),), PROMPTS[int(rng.integers(2))]))
    return colours, samples


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Trained for seconds to name the colour of a picture."""
    folder = build_tiny_llava(
        Path(tmp_path_factory.mktemp("tiny")),
        vocabulary=["describe it . what is it ? a red blue green picture"],
        image_size=24, patch_size=8, hidden=32, layers=2, vision_hidden=32, vision_layers=1, initializer_range=0.15,
    )  # fmt: skip
    policy = load_policy(ModelSection(path=str(folder), dtype="float32"), device="cpu")
    policy.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-3)
    colours, samples = pictures(96, seed=1)
    prompts = encode_prompts(policy, samples)
    rng = np.random.default_rng(2)
    for _ in range(STEPS):
        drawn = rng.integers(0, len(samples), 16)
        captions = [[encode_caption(policy, f"a {colours[i]} picture .")] for i in drawn]
        scores = score_completions(policy, [prompts[i] for i in drawn], None, captions, 1.0)
        optimizer.zero_grad()
        (-scores.logprobs.sum() / scores.mask.sum()).backward()
        optimizer.step()
    policy.model.requires_grad_(False)
    return policy


@contextmanager
def blind(policy: Policy) -> Iterator[None]:
    """Within it the policy sets the embeddings of its image tokens to 0 before it reads them."""
    (prompt,) = encode_prompts(policy, pictures(1, seed=0)[1])
    columns = (prompt.input_ids == policy.placeholder_id).nonzero()[:, 0]

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None or embeddings.shape[1] < prompt.input_ids.numel():
            return None  # what comes after the prompt
        return args, {**kwargs, "inputs_embeds": embeddings.index_fill(1, columns, 0.0)}

    handle = policy.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def look(policy: Policy) -> Look:
    """What the policy samples for new pictures, and what that hangs on and goes with."""
    colours, samples = pictures(SAMPLES, seed=7)
    prompts = encode_prompts(policy, samples)
    requests = [DecodeRequest(p, 1, SamplingParams(max_new_tokens=6, seed=i)) for i, p in enumerate(prompts)]
    said = [output.completions[0] for output in decode_groups(Decoder(policy, max_rows=64), requests)]
    tokens = [completion.token_ids for completion in said]
    features = vision_features(policy, prompts)
    states = caption_states(policy, prompts, features, tokens)
    rows = list(zip(prompts, features, tokens, strict=True))[:PROBED]
    modalities = {name: torch.stack([state.modalities[name] for state in states]) for name in ("image", "text")}
    return Look(
        right=sum(colour in c.text for colour, c in zip(colours, said, strict=True)),
        importance=[caption_importance(policy, *row) for row in rows],
        correlations=correlations(torch.stack([state.action for state in states]), modalities),
    )


def test_share_and_correlation_tell_a_policy_that_looks_from_one_that_does_not(policy: Policy) -> None:
    looking = look(policy)
    with blind(policy):
        ignoring = look(policy)
    assert looking.right > 0.9 * SAMPLES
    assert ignoring.right < 0.6 * SAMPLES
    assert looking.share("image") > 0.03
    assert ignoring.share("image") < 1e-6
    assert max(each.rms["image"] for each in ignoring.importance) < 1e-9
    assert looking.correlations["image"].rho > 0.6
    assert looking.correlations["image"].p_value < 0.005
    assert ignoring.correlations["image"].rho < 0.2
    assert ignoring.correlations["image"].p_value > 0.05
    assert looking.correlations["text"].rho < 0.2, "the prompt's wording says nothing about the colour"
