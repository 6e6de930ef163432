"""A group outside a process: the one form in which it travels, is checkpointed, and is logged.

    rows      its completions as the rollout log has them (`experience/schema.py`), with their rewards: an Arrow stream
    facts     JSON: the sample but its images, the sampling parameters; each tensor's name, type and shape
    images    the sample's image files
    buffers   the bytes of the other tensors: prompt, vision features, states

So captions, tokens and log-probs are written once. The controller gets a copy of the rows, which is all that the log
needs; the learner reads completions out of them. No pickle: a checkpoint that is opened runs nothing.

Groups travel in parcels. An object of Ray's store (a return value of more than 100 KB) costs about 1 ms of CPU, over
the worker that makes it, the node's raylet and the owner that frees it: measured with 128 and 256 KB alike. So the
groups of one assignment share an object up to `PARCEL_BYTES`; a larger group has one to itself, and a learner's rank on
another node pulls little that it has no use for. Whoever wants one group of a parcel decodes that one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load

from mmrl_ray.data.row import pickled_by_fields
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RolloutError
from mmrl_ray.experience.carriers import (
    CaptionState,
    Completion,
    EncodedPrompt,
    GroupKey,
    RewardBreakdown,
    RewardFailure,
    RolloutGroup,
    SamplingParams,
    Score,
    ScoredGroup,
    VisionFeatures,
)
from mmrl_ray.experience.schema import decode_records, encode_records, encode_table, group_rows

PARCEL_BYTES = 4 * 1024 * 1024
"""A parcel takes no further group that would make it larger."""
_BESIDE_BYTES = 4096
"""Tensors from this size on travel as arrays, which Ray copies into its store without another copy."""
_FORMAT, _OLD_FORMAT = 2, 1
_BUFFER_KEY = "buffer.arrow"
_CHECKPOINT_SCHEMA = pa.schema(
    [
        pa.field("scored", pa.string(), nullable=False),
        pa.field("rows", pa.binary(), nullable=False),
        pa.field("facts", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("buffers", pa.list_(pa.binary()), nullable=False),
    ]
)


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """One group of a parcel."""

    rows: tuple[int, int]
    """Where its rows begin in the parcel's, and how many they are."""
    facts: str
    images: tuple[bytes, ...]
    buffers: tuple[Any, ...]
    """Of each tensor that `facts` names: bytes, or a uint8 array [bytes]."""

    @property
    def nbytes(self) -> int:
        """Bytes of the parcel without its rows."""
        return len(self.facts) + sum(map(len, self.images)) + sum(map(len, self.buffers))


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class Parcel:
    """Groups in one object."""

    rows: bytes
    """Of all of them, as `encode_records` makes them."""
    groups: tuple[EncodedGroup, ...]


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class Parcelled:
    """Where one group lies: a `ScoredGroup.payload`."""

    parcel: Any
    """A `Parcel`, a reference to one, or before its return value has a reference, which of those it is."""
    place: int


def pack(run: str, groups: Iterable[ScoredGroup]) -> tuple[list[Parcel], list[ScoredGroup]]:
    """Takes scored groups apart whose payload is their `RolloutGroup`.

    Returns (parcels, the groups with a `Parcelled` for a payload: the number of its parcel, and its place in that).

    Example:
        >>> parcels, groups = pack("my-run", scored)
        >>> open_payload(groups[0].payload, parcels.__getitem__)
        RolloutGroup(…)
    """
    filled: list[list[tuple[ScoredGroup, EncodedGroup]]] = []
    placed, room = [], 0
    for group in groups:
        encoded = _encode(group.payload)
        if not filled or encoded.nbytes > room:
            filled.append([])
            room = PARCEL_BYTES
        placed.append(replace(group, payload=Parcelled(len(filled) - 1, len(filled[-1]))))
        filled[-1].append((group, encoded))
        room -= encoded.nbytes
    return [_with_rows(run, parcel) for parcel in filled], placed


def open_payload(payload: Any, fetch: Callable[[Any], Any]) -> RolloutGroup:
    """The group behind a payload; `fetch` turns a reference into the object, and leaves what is none as it is."""
    return _decode(fetch(payload.parcel), payload.place) if isinstance(payload, Parcelled) else fetch(payload)


def encode_checkpoint(
    run: str, step: int, stream: Mapping[str, Any], groups: Iterable[ScoredGroup], fetch: Callable[[Any], Any]
) -> dict[str, Any]:
    """After `step` finished steps, the sample stream standing at `stream`, with these groups in the buffer.

    JSON-able values, and the groups as the bytes of an Arrow file; their parcels are not decoded.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _CHECKPOINT_SCHEMA) as writer:
        for group in groups:
            parcel = _alone(run, group, fetch)
            row = {
                "scored": json.dumps(asdict(replace(group, payload=None))),
                "rows": parcel.rows,
                "facts": parcel.groups[0].facts,
                "images": list(parcel.groups[0].images),
                "buffers": [bytes(buffer) for buffer in parcel.groups[0].buffers],
            }
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=_CHECKPOINT_SCHEMA))
    return {"format": _FORMAT, "next_step": step, "stream": stream, _BUFFER_KEY: sink.getvalue().to_pybytes()}


def decode_checkpoint(
    run: str, state: Mapping[str, Any]
) -> tuple[int, Mapping[str, Any], list[tuple[ScoredGroup, Parcel]]]:
    """(step, stream, groups) that `encode_checkpoint` was given: each without its payload, and alone in its parcel.

    Raises:
        RolloutError: the state is of another format.
    """
    found = state.get("format")
    if found not in (_FORMAT, _OLD_FORMAT):
        raise RolloutError(f"the controller's checkpoint has format {found!r}, not {_FORMAT}")
    rows = pa.ipc.open_file(state[_BUFFER_KEY]).read_all().to_pylist()
    groups = []
    for row in rows:
        scored = _scored(json.loads(row["scored"]))
        if found == _OLD_FORMAT:
            parcel = _alone(run, replace(scored, payload=_old_group(row)), lambda group: group)
        else:
            count = decode_records(row["rows"]).num_rows
            encoded = EncodedGroup((0, count), row["facts"], tuple(row["images"]), tuple(row["buffers"]))
            parcel = Parcel(row["rows"], (encoded,))
        groups.append((scored, parcel))
    return int(state["next_step"]), state["stream"], groups


# -- a group -----------------------------------------------------------------------------------------------------------


def _encode(group: RolloutGroup) -> EncodedGroup:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(group).items()}
    sample = group.sample
    facts = {
        "sample": {
            "id": sample.id,
            "prompt": sample.prompt,
            "references": sample.references,
            "metadata": dict(sample.metadata),
            "place": sample.place,
        },
        "image_key": group.prompt.image_key,
        "policy_version": group.policy_version,
        "sampling": asdict(group.sampling),
        "tensors": [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()],
    }
    # What JSON has no form for, a date in a Parquet struct say, goes as its text.
    return EncodedGroup(
        (0, 0), json.dumps(facts, default=str), tuple(sample.images), tuple(map(_buffer, tensors.values()))
    )


def _tensors(group: RolloutGroup) -> dict[str, torch.Tensor]:
    """Those that are not in the rows."""
    tensors = {"prompt": group.prompt.input_ids}
    tensors |= {f"input/{name}": value for name, value in group.prompt.model_inputs.items()}
    if group.vision is not None:
        tensors["vision"] = group.vision.tokens
        tensors |= {f"deepstack/{i}": layer for i, layer in enumerate(group.vision.deepstack)}
    if group.state is not None:
        tensors |= {"state/action": group.state.action, "state/hidden": group.state.hidden}
        tensors |= {f"modality/{name}": value for name, value in group.state.modalities.items()}
    return tensors


def _decode(parcel: Parcel, place: int) -> RolloutGroup:
    encoded = parcel.groups[place]
    facts = json.loads(encoded.facts)
    tensors = {
        name: _tensor(buffer, getattr(torch, dtype), shape)
        for (name, dtype, shape), buffer in zip(facts["tensors"], encoded.buffers, strict=True)
    }
    rows = decode_records(parcel.rows).slice(*encoded.rows)
    completions = _completions(rows)
    greedy = completions.pop() if completions and rows["completion"][-1].as_py() == -1 else None
    return _group(facts, encoded.images, tensors, completions, greedy)


def _group(
    facts: Mapping[str, Any],
    images: Sequence[bytes],
    tensors: Mapping[str, torch.Tensor],
    completions: Sequence[Completion],
    greedy: Completion | None,
) -> RolloutGroup:
    sample = facts["sample"]
    return RolloutGroup(
        sample=Sample(
            id=sample["id"],
            images=tuple(images),
            prompt=sample["prompt"],
            references=tuple(sample["references"]),
            metadata=sample["metadata"],
            place=sample.get("place", ""),  # checkpoints from before rows were known by their places have none
        ),
        prompt=EncodedPrompt(tensors["prompt"], _named(tensors, "input/"), facts["image_key"]),
        completions=tuple(completions),
        policy_version=facts["policy_version"],
        sampling=SamplingParams(**{**facts["sampling"], "stop": tuple(facts["sampling"]["stop"])}),
        greedy=greedy,
        vision=VisionFeatures(tensors["vision"], _layers(tensors)) if "vision" in tensors else None,
        state=(
            CaptionState(tensors["state/action"], _named(tensors, "modality/"), tensors["state/hidden"])
            if "state/action" in tensors
            else None
        ),
    )


def _named(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _layers(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(tensors[f"deepstack/{i}"] for i in range(len(_named(tensors, "deepstack/"))))


def _completions(rows: pa.Table) -> list[Completion]:
    names = ("token_ids", "behaviour_logprobs", "caption", "finish_reason", "reference_logprobs")
    return [
        Completion(
            token_ids=_listed(tokens),
            logprobs=_listed(logprobs),
            text=caption.as_py(),
            finish_reason=reason.as_py(),
            reference_logprobs=_listed(reference) if reference.is_valid else None,
        )
        for tokens, logprobs, caption, reason, reference in zip(*(rows[name] for name in names), strict=True)
    ]


def _listed(cell: Any) -> torch.Tensor:
    """A list of numbers as a tensor of the column's type, without a Python object for each."""
    return torch.from_numpy(cell.values.to_numpy().copy())


def _buffer(tensor: torch.Tensor) -> Any:
    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.tobytes() if flat.nbytes < _BESIDE_BYTES else flat


def _tensor(buffer: Any, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    # A copy: the store's memory is read-only, and goes when the reference goes.
    writable = np.frombuffer(buffer, dtype=np.uint8).copy()
    return torch.from_numpy(writable).view(dtype).reshape(shape) if writable.size else torch.empty(shape, dtype=dtype)


# -- its parcel --------------------------------------------------------------------------------------------------------


def _with_rows(run: str, groups: Sequence[tuple[ScoredGroup, EncodedGroup]]) -> Parcel:
    rows: list[dict[str, Any]] = []
    encoded = []
    for scored, group in groups:
        own = group_rows(run, scored, scored.payload)
        encoded.append(replace(group, rows=(len(rows), len(own))))
        rows += own
    return Parcel(encode_records(rows), tuple(encoded))


def _alone(run: str, scored: ScoredGroup, fetch: Callable[[Any], Any]) -> Parcel:
    """A parcel of this group only."""
    at = scored.payload
    if not isinstance(at, Parcelled):
        (alone,), _ = pack(run, [replace(scored, payload=fetch(at))])
        return alone
    parcel: Parcel = fetch(at.parcel)
    group = parcel.groups[at.place]
    rows = decode_records(parcel.rows).slice(*group.rows)
    return Parcel(encode_table(rows), (replace(group, rows=(0, rows.num_rows)),))


# -- what a checkpoint says of it beside -------------------------------------------------------------------------------


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
            "truncated": tuple(facts.get("truncated", ())),
        }
    )


def _score(facts: Mapping[str, Any]) -> Score:
    return RewardFailure(**facts) if "reason" in facts else RewardBreakdown(**facts)


def _old_group(row: Mapping[str, Any]) -> RolloutGroup:
    """Of a checkpoint in the first format, whose completions were among facts and tensors, and those safetensors."""
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
    return _group(facts, row["images"], tensors, completions, greedy)
