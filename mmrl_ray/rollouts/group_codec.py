"""Buffered groups as bytes for a checkpoint: an Arrow table of JSON facts, image files and safetensors. No pickle.

What a checkpoint of the controller holds: JSON-able values, and the buffered groups as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load, save

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RolloutError
from mmrl_ray.experience.breakdown import RewardBreakdown, RewardFailure, Score
from mmrl_ray.experience.carriers import (
    Completion,
    EncodedPrompt,
    GroupKey,
    RolloutGroup,
    SamplingParams,
    ScoredGroup,
    VisionFeatures,
)

_SCHEMA = pa.schema(
    [
        pa.field("scored", pa.string(), nullable=False),
        pa.field("facts", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("tensors", pa.binary(), nullable=False),
    ]
)
_FORMAT = 1
_BUFFER_KEY = "buffer.arrow"


def encode_groups(groups: Iterable[tuple[ScoredGroup, RolloutGroup]]) -> bytes:
    """An Arrow file with one row a group; `decode_groups` takes it back."""
    rows = [
        {
            "scored": json.dumps(asdict(replace(scored, payload=None))),
            "facts": json.dumps(_facts(group)),
            "images": list(group.sample.images),
            "tensors": save(_tensors(group)),
        }
        for scored, group in groups
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    return sink.getvalue().to_pybytes()


def decode_groups(encoded: bytes) -> list[tuple[ScoredGroup, RolloutGroup]]:
    """What `encode_groups` was given; each `payload` is None."""
    rows = pa.ipc.open_file(encoded).read_all().to_pylist()
    return [(_scored(json.loads(row["scored"])), _group(row)) for row in rows]


def _facts(group: RolloutGroup) -> dict[str, Any]:
    every = (*group.completions, *([group.greedy] if group.greedy else []))
    return {
        "sample": {
            "id": group.sample.id,
            "prompt": group.sample.prompt,
            "references": list(group.sample.references),
            "metadata": dict(group.sample.metadata),
            "place": group.sample.place,
        },
        "image_key": group.prompt.image_key,
        "policy_version": group.policy_version,
        "sampling": asdict(group.sampling),
        "completions": [{"text": c.text, "finish_reason": c.finish_reason} for c in every],
        "has_greedy": group.greedy is not None,
    }


def _tensors(group: RolloutGroup) -> dict[str, torch.Tensor]:
    tensors = {"prompt": group.prompt.input_ids}
    tensors |= {f"input/{name}": value for name, value in group.prompt.model_inputs.items()}
    for i, completion in enumerate((*group.completions, *([group.greedy] if group.greedy else []))):
        tensors |= {f"tokens/{i}": completion.token_ids, f"logprobs/{i}": completion.logprobs}
        if completion.reference_logprobs is not None:
            tensors[f"reference/{i}"] = completion.reference_logprobs
    if group.vision is not None:
        tensors["vision"] = group.vision.tokens
        tensors |= {f"deepstack/{i}": layer for i, layer in enumerate(group.vision.deepstack)}
    # A view of a larger tensor would be refused, or drag all of it along.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _scored(facts: Mapping[str, Any]) -> ScoredGroup:
    greedy = facts["greedy_reward"]
    return ScoredGroup(
        **{
            **facts,
            "key": GroupKey(**facts["key"]),
            "completion_tokens": tuple(facts["completion_tokens"]),
            "rewards": tuple(map(_score, facts["rewards"])),
            "greedy_reward": None if greedy is None else _score(greedy),
            "kl1": tuple(facts["kl1"]),
        }
    )


def _score(facts: Mapping[str, Any]) -> Score:
    return RewardFailure(**facts) if "reason" in facts else RewardBreakdown(**facts)


def _group(row: Mapping[str, Any]) -> RolloutGroup:
    facts, tensors = json.loads(row["facts"]), load(row["tensors"])
    completions = [
        Completion(
            token_ids=tensors[f"tokens/{i}"],
            logprobs=tensors[f"logprobs/{i}"],
            reference_logprobs=tensors.get(f"reference/{i}"),
            **texts,
        )
        for i, texts in enumerate(facts["completions"])
    ]
    greedy = completions.pop() if facts["has_greedy"] else None
    sample = facts["sample"]
    sampling = {**facts["sampling"], "stop": tuple(facts["sampling"]["stop"])}
    deepstack = [tensors[f"deepstack/{i}"] for i in range(sum(name.startswith("deepstack/") for name in tensors))]
    return RolloutGroup(
        sample=Sample(
            id=sample["id"],
            images=tuple(row["images"]),
            prompt=sample["prompt"],
            references=tuple(sample["references"]),
            metadata=sample["metadata"],
            place=sample.get("place", ""),  # checkpoints from before rows were known by their places have none
        ),
        prompt=EncodedPrompt(
            input_ids=tensors["prompt"],
            model_inputs={n.removeprefix("input/"): t for n, t in tensors.items() if n.startswith("input/")},
            image_key=facts["image_key"],
        ),
        completions=tuple(completions),
        policy_version=facts["policy_version"],
        sampling=SamplingParams(**sampling),
        greedy=greedy,
        vision=VisionFeatures(tensors["vision"], tuple(deepstack)) if "vision" in tensors else None,
    )


def encode_checkpoint(
    step: int, stream: Mapping[str, Any], groups: Iterable[tuple[ScoredGroup, RolloutGroup]]
) -> dict[str, Any]:
    """After `step` finished steps, the sample stream standing at `stream`, with these groups in the buffer."""
    return {"format": _FORMAT, "next_step": step, "stream": stream, _BUFFER_KEY: encode_groups(groups)}


def decode_checkpoint(
    state: Mapping[str, Any],
) -> tuple[int, Mapping[str, Any], list[tuple[ScoredGroup, RolloutGroup]]]:
    """(step, stream, groups) that `encode_checkpoint` was given.

    Raises:
        RolloutError: the state is of another format.
    """
    if (found := state.get("format")) != _FORMAT:
        raise RolloutError(f"the controller's checkpoint has format {found!r}, not {_FORMAT}")
    return int(state["next_step"]), state["stream"], decode_groups(state[_BUFFER_KEY])
