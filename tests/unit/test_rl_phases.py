"""`benchmarks/rl_phases.py`: the operations that it counts in a step of the product, against formulas by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmrl_ray.config import Config
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.samples import read_split
from mmrl_ray.data.scenes.generator import generate_scenes, scenes_vocabulary
from mmrl_ray.data.writing import write_parquet
from mmrl_ray.policy.tiny import build_tiny_llava

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import rl_phases

K, G, T, R = 2, 3, 4, 8
"""Pictures, completions of each, their tokens, and the adapter's rank."""
D, INNER, LAYERS, PATCHES, EYE, EYE_INNER, EYE_LAYERS, PATCH = 128, 384, 3, 16, 48, 96, 2, 8
"""Of the model: `build_tiny_llava` makes the inner widths 3 and 2 times the outer ones."""


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> rl_phases.Step:
    folder = tmp_path_factory.mktemp("phases")
    model = build_tiny_llava(
        folder / "model",
        vocabulary=[*scenes_vocabulary(), *(f"word{i}" for i in range(900))],  # so that none ends early by chance
        image_size=32,
        hidden=D,
        layers=LAYERS,
        vision_hidden=EYE,
        vision_layers=EYE_LAYERS,
    )
    samples, _ = generate_scenes(ScenesSection(train=3 * K, eval=1, image_size=32))
    write_parquet(folder / "train.parquet", samples)
    cfg = Config.model_validate(
        {
            "run": {"name": "phases"},
            "model": {"path": str(model), "dtype": "float32", "lora": {"r": R, "alpha": 2 * R}},
            "data": {"train": str(folder / "train.parquet"), "prompt": "describe"},
            "rollout": {"group_size": G, "max_new_tokens": T, "groups_per_assignment": K},
            "learner": {"steps": 9, "groups_per_step": K, "kl": {"weight": 0.1}},
        }
    )
    made = rl_phases.Step(cfg, read_split(cfg.data.train, prompt="describe"))
    made.take()  # which compares ways of scoring
    return made


def layers(tokens: int, seen: int, *, last: int) -> int:
    """Of a pass of `tokens` through the language model, which attend to `seen`; `last` go through all of its end."""
    of_keys, of_others = 2 * 2 * D * D, 2 * (2 * D * D + 3 * D * INNER)
    return weighted(of_keys, of_others, tokens, last) + LAYERS * attention(tokens, seen, D)


def branches(tokens: int, *, last: int) -> int:
    """Of the adapter in such a pass."""
    of_keys, of_others = 2 * R * 4 * D, 2 * R * (4 * D + 3 * (D + INNER))
    return weighted(of_keys, of_others, tokens, last)


def weighted(of_keys: int, of_others: int, tokens: int, last: int) -> int:
    return tokens * (LAYERS * of_keys + (LAYERS - 1) * of_others) + last * of_others


def backward(tokens: int, seen: int, *, last: int, attends: int) -> int:
    """Of the gradient of both. Each product once, towards its input, but for the first ones, whose input is frozen; of
    the branch also towards its weights; of attention so many."""
    frozen = tokens * 3 * 2 * (D * D + R * D)
    through = layers(tokens, seen, last=last) - LAYERS * attention(tokens, seen, D)
    attended = LAYERS * attention(tokens, seen, D) // 2 * attends
    return through + 2 * branches(tokens, last=last) - frozen + attended


def attention(queries: int, keys: int, width: int) -> int:
    return 2 * 2 * queries * keys * width


def test_the_counted_operations_are_those_of_the_formulas(step: rl_phases.Step) -> None:
    with FlopCounterMode(display=False, custom_mapping=rl_phases.FORMULAS) as counter:
        step.watch = watch = rl_phases.Stopwatch(counter)
        with watch.at_the_seams():
            step.take()
    found: dict[str, Any] = dict(watch.flop)
    vocabulary = step._policy.vocab_size
    prompt = PATCHES + 5
    head = 2 * D * vocabulary
    eye = (PATCHES + 1) * EYE_LAYERS * 2 * (4 * EYE * EYE + 2 * EYE * EYE_INNER)
    eye += EYE_LAYERS * attention(PATCHES + 1, PATCHES + 1, EYE)
    eye += PATCHES * 2 * (3 * PATCH * PATCH * EYE + EYE * D + D * D)
    counted = {phase: found[phase] for phase in rl_phases.PHASES}
    assert found["vision"] == K * eye
    prompts = K * layers(prompt, prompt, last=1)
    assert found["prefill"] == prompts + K * head
    rows = K * G
    steps = sum(layers(rows, prompt + (i + 1) * G, last=rows) for i in range(T - 1))
    assert found["decode"] == steps + (T - 1) * rows * head
    behind = layers(rows * (T - 1), prompt + T - 1, last=rows * (T - 1))
    assert found["reference"] == prompts + behind + rows * T * head
    learnt = rows * (T - 1)
    scored = prompts + behind + rows * T * head
    adapted = K * branches(prompt, last=1) + branches(learnt, last=learnt)
    assert found["learner: forward"] == scored + adapted
    # PyTorch's attention makes its scores again; that of completions, which share a prompt, has kept them.
    gradient = K * backward(prompt, prompt, last=1, attends=5)
    gradient += backward(learnt, prompt + T - 1, last=learnt, attends=4)
    assert found["learner: backward"] == gradient + rows * T * head
    merging = 2 * R * LAYERS * (4 * D * D + 3 * D * INNER)
    assert found["hand-over"] == merging
    assert sum(found.values()) == sum(counted.values()), "something was counted outside of the phases"


def test_products_alone_are_the_phases_own(step: rl_phases.Step) -> None:
    product = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    step.watch = rl_phases.Stopwatch()
    with step.watch.at_the_seams(), rl_phases.Operations(step.watch, [product]) as operations:
        step.take()
    calls = operations.products["learner: backward"]
    assert {call.function for call in calls} == {product.default}
    assert calls.total() == LAYERS, "of prompts; that of completions is our own"
    assert all(call.seconds() > 0 for call in calls)
