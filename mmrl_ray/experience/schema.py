"""The one Arrow schema of a scored completion: a row of the rollout log.

Plain nested types only (no maps, no extension types), so that duckdb, pandas and Hugging Face `datasets` open the
Parquet files as they are. Images are not in it: they lie once, by content hash, under `images/` of the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from mmrl_ray.data.images import image_hash
from mmrl_ray.experience.carriers import (
    Completion,
    RewardBreakdown,
    RewardFailure,
    RolloutGroup,
    Score,
    ScoredGroup,
)

_PART = pa.struct([("name", pa.string()), ("value", pa.float64()), ("weight", pa.float64())])
_TIMING = pa.struct([("phase", pa.string()), ("seconds", pa.float64())])
_SAMPLING = pa.struct(
    [
        ("temperature", pa.float64()),
        ("top_k", pa.int64()),
        ("top_p", pa.float64()),
        ("max_new_tokens", pa.int64()),
        ("seed", pa.int64()),
    ]
)

ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("run", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),  # place of the group in its step
        pa.field("attempt", pa.int64(), nullable=False),
        pa.field("completion", pa.int64(), nullable=False),  # place in the group; -1 is the greedy baseline
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("staleness", pa.int64()),  # null when the group took no part in a step
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image_hash", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("behaviour_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("reference_logprobs", pa.list_(pa.float32())),  # null when the KL weight is 0
        pa.field("reward_parts", pa.list_(_PART), nullable=False),  # weight null for parts of parts
        pa.field("reward", pa.float64()),  # null when masked
        pa.field("reward_sigma", pa.float64()),  # null where no part knows its own
        pa.field("reward_risk", pa.float64()),  # kappa; null when masked
        pa.field("reward_adjusted", pa.float64()),  # reward - kappa * sigma; null when masked
        pa.field("reward_normalization", pa.string()),  # none, or group; null when the group took no part in a step
        pa.field("learning_reward", pa.float64()),  # what the baseline saw; null as the advantage is
        # null when the group took no part in a step, and for the greedy baseline; 0 when masked beside others
        pa.field("advantage", pa.float64()),
        pa.field("masked", pa.string()),  # why the completion took no part, or null
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("sampling", _SAMPLING, nullable=False),
        pa.field("worker", pa.string(), nullable=False),
        pa.field("timings", pa.list_(_TIMING), nullable=False),  # of the assignment the group was part of
    ]
)


def encode_records(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """`encode_table` of rows as made by `group_rows`."""
    return encode_table(pa.Table.from_pylist(rows, schema=ROLLOUT_SCHEMA))


def encode_table(table: pa.Table) -> bytes:
    """A table of `ROLLOUT_SCHEMA` as an Arrow IPC stream; `decode_records` takes it back.

    Bytes, since a table's columns would be pickled one by one, which costs as much as all else about a group.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, ROLLOUT_SCHEMA) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def decode_records(encoded: bytes) -> pa.Table:
    """The table that `encode_table` was given."""
    return pa.ipc.open_stream(encoded).read_all()


def group_rows(run: str, scored: ScoredGroup, group: RolloutGroup) -> list[dict[str, Any]]:
    """The rows of one group: G completions, then the greedy baseline if there is one.

    What a step makes of them is null until `run_records.rollout_log.step_table` fills it in.

    Args:
        scored: its rewards; a masked group has none, and each completion without one has its reason.
    """
    common = {
        "run": run,
        "step": scored.key.step,
        "index": scored.key.index,
        "attempt": scored.key.attempt,
        "policy_version": scored.policy_version,
        "sample_id": scored.sample_id,
        "image_hash": image_hash(group.sample.images),
        "prompt": group.sample.prompt,
        "sampling": {field.name: getattr(group.sampling, field.name) for field in _SAMPLING},
        "worker": scored.worker,
        "timings": [{"phase": phase, "seconds": seconds} for phase, seconds in scored.timings.items()],
    }
    rows = []
    for i, completion in enumerate(group.completions):
        reward = scored.rewards[i] if scored.rewards else RewardFailure(scored.masked or "")
        rows.append({**common, **_completion_row(completion, reward), "completion": i})
    if group.greedy is not None:
        unknown = None if scored.masked is None else RewardFailure(scored.masked)
        rows.append({**common, **_completion_row(group.greedy, scored.greedy_reward or unknown), "completion": -1})
    return rows


def _completion_row(completion: Completion, score: Score | None) -> dict[str, Any]:
    reference = completion.reference_logprobs
    reward = score if isinstance(score, RewardBreakdown) else None
    parts = reward.parts if reward else {}
    return {
        "caption": completion.text,
        "token_ids": completion.token_ids.tolist(),
        "behaviour_logprobs": completion.logprobs.tolist(),
        "reference_logprobs": None if reference is None else reference.tolist(),
        "finish_reason": completion.finish_reason,
        "reward_parts": [
            {"name": name, "value": value, "weight": reward.weights.get(name) if reward else None}
            for name, value in parts.items()
        ],
        "masked": score.reason if isinstance(score, RewardFailure) else None,
        "reward": reward.total if reward else None,
        "reward_sigma": reward.sigma if reward else None,
        "reward_risk": reward.risk if reward else None,
        "reward_adjusted": reward.adjusted if reward else None,
    }
