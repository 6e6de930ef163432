"""Groups made by hand."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import torch
from PIL import Image

from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import (
    Completion,
    EncodedPrompt,
    GroupKey,
    RewardBreakdown,
    RolloutGroup,
    SamplingParams,
    ScoredGroup,
)
from mmrl_ray.experience.schema import ROLLOUT_SCHEMA, group_rows


def png(colour: str = "red", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def reward(total: float) -> RewardBreakdown:
    return RewardBreakdown(total=total, parts={"a": total / 2, "b": total}, weights={"a": 0.0, "b": 1.0})


def scored(
    step: int = 0,
    index: int = 0,
    *,
    version: int | None = None,
    totals: Sequence[float] = (0.0, 1.0),
    lengths: Sequence[int] = (2, 3),
    prompt_tokens: int = 5,
    attempt: int = 0,
    greedy_reward: float | None = None,
    kl1: Sequence[float] = (),
    masked: str | None = None,
) -> ScoredGroup:
    return ScoredGroup(
        key=GroupKey(step, index, attempt),
        sample_id=f"s{step}-{index}",
        policy_version=step if version is None else version,
        prompt_tokens=prompt_tokens,
        completion_tokens=tuple(lengths),
        rewards=() if masked else tuple(reward(t) for t in totals),
        greedy_reward=None if greedy_reward is None else reward(greedy_reward),
        kl1=tuple(kl1),
        masked=masked,
        payload=f"payload-{step}-{index}",
        worker="w0",
        timings={"sample": 0.5},
    )


def completion(tokens: Sequence[int], *, text: str = "a red circle", reference: bool = False) -> Completion:
    logprobs = -torch.arange(1, len(tokens) + 1, dtype=torch.float32)
    return Completion(
        token_ids=torch.tensor(tokens),
        logprobs=logprobs,
        text=text,
        finish_reason="stop",
        reference_logprobs=logprobs - 0.5 if reference else None,
    )


def rollout_group(lengths: Sequence[int] = (2, 3), *, reference: bool = False, greedy: bool = False) -> RolloutGroup:
    return RolloutGroup(
        sample=Sample(id="s0-0", images=(png(),), prompt="Describe.", references=("a red circle",)),
        prompt=EncodedPrompt(input_ids=torch.arange(5), model_inputs={}, image_key="k"),
        completions=tuple(completion(range(1, n + 1), reference=reference) for n in lengths),
        policy_version=0,
        sampling=SamplingParams(seed=7),
        greedy=completion([4, 5], text="greedy words") if greedy else None,
    )


def group_table(run: str, scored: ScoredGroup, group: RolloutGroup) -> pa.Table:
    return pa.Table.from_pylist(group_rows(run, scored, group), schema=ROLLOUT_SCHEMA)
