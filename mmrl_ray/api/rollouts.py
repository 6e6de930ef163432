"""The rollout log of a run as a frame: a row a caption that was sampled to learn from."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmrl_ray.errors import RunError, one_line
from mmrl_ray.evaluation.frames import Captions, Picture, part_columns
from mmrl_ray.run_records.rollout_log import rollouts_name
from mmrl_ray.run_records.run_dir import RunDir

_COLUMNS = (
    "step",
    "index",
    "completion",
    "sample_id",
    "image_hash",
    "caption",
    "reward",
    "reward_sigma",
    "reward_parts",
    "advantage",
    "finish_reason",
    "masked",
    "policy_version",
    "prompt",
)
"""Of `experience/schema.py`. Tokens and their log-probs are in the files."""


def rollout_captions(run: RunDir, steps: Sequence[int], picture: Callable[[str], Picture]) -> Captions:
    """Rows in the order of steps, groups and completions; `completion` -1 is a greedy baseline.

    Raises:
        RunError: a step's file cannot be read.
    """
    pictures: dict[str, Picture] = {}
    rows = [_row(row, pictures, picture) for step in steps for row in _read(run, step)]
    return Captions(rows)


def _read(run: RunDir, step: int) -> list[dict[str, Any]]:
    name = rollouts_name(step)
    try:
        with pq.ParquetFile(io.BytesIO(run.read_bytes(name))) as file:
            there = [column for column in _COLUMNS if column in file.schema_arrow.names]  # an older version has fewer
            rows: list[dict[str, Any]] = file.read(columns=there).to_pylist()
            return rows
    except pa.ArrowException as error:
        raise RunError(f"{run.full_path(name)} cannot be read: {one_line(error)}") from error


def _row(row: dict[str, Any], pictures: dict[str, Picture], picture: Callable[[str], Picture]) -> dict[str, Any]:
    digest = row["image_hash"]
    if digest not in pictures:
        pictures[digest] = picture(digest)
    reward = row["reward"]
    return {
        "step": row["step"],
        "sample": row["sample_id"],
        "group": row["index"],
        "completion": row["completion"],
        "picture": pictures[digest],
        "caption": row["caption"],
        "reward": float("nan") if reward is None else reward,
        "advantage": row["advantage"],
        **part_columns({part["name"]: part["value"] for part in row["reward_parts"]}),
        "reward_sigma": row.get("reward_sigma"),
        "finish_reason": row["finish_reason"],
        "masked": row["masked"],
        "policy_version": row["policy_version"],
        "prompt": row["prompt"],
    }
