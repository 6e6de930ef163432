from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from mmrl_ray.data.images import image_hash
from mmrl_ray.experience.carriers import PlannedGroup, ScoredGroup
from mmrl_ray.experience.schema import ROLLOUT_SCHEMA
from mmrl_ray.run_records.rollout_log import step_table

from .factories import group_table, png, rollout_group, scored


def wary(group: ScoredGroup) -> ScoredGroup:
    assert group.greedy_reward is not None
    rewards = tuple(replace(row, sigma=0.5, risk=2.0) for row in group.rewards)
    return replace(group, rewards=rewards, greedy_reward=replace(group.greedy_reward, sigma=0.5, risk=2.0))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    group, result = rollout_group(reference=True, greedy=True), wary(scored(greedy_reward=0.25))
    planned = PlannedGroup(result.key, "s0-0", 0, (-1.0, 1.0), (1.0, 1.0), (2, 3), 5, None, (0.25, 0.75), "group")
    masked = scored(index=1, masked="reward timed out")
    rows = pa.concat_tables([group_table("r", result, group), group_table("r", masked, rollout_group())])
    step = step_table(frozenset((result.key, masked.key)), {result.key: planned}, rows)
    pq.write_table(step, tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def test_each_completion_is_a_row_and_the_greedy_baseline_is_marked(log: Path) -> None:
    table = pq.read_table(log)
    assert table.schema.equals(ROLLOUT_SCHEMA)
    rows = table.to_pylist()
    rows = [*rows[1:3], rows[0], *rows[3:]]  # the baseline comes first
    assert [(r["index"], r["completion"]) for r in rows] == [(0, 0), (0, 1), (0, -1), (1, 0), (1, 1)]
    assert [r["advantage"] for r in rows] == [-1.0, 1.0, None, None, None]
    assert [r["reward"] for r in rows] == [0.0, 1.0, 0.25, None, None]
    assert [r["learning_reward"] for r in rows] == [0.25, 0.75, None, None, None]
    assert [r["reward_normalization"] for r in rows] == ["group"] * 3 + [None] * 2
    assert [r["reward_sigma"] for r in rows] == [0.5, 0.5, 0.5, None, None]
    assert [r["reward_risk"] for r in rows] == [2.0, 2.0, 2.0, None, None]
    assert [r["reward_adjusted"] for r in rows] == [-1.0, 0.0, -0.75, None, None]
    assert rows[2]["reward_parts"][1] == {"name": "b", "value": 0.25, "weight": 1.0}
    assert [r["masked"] for r in rows] == [None] * 3 + ["reward timed out"] * 2
    assert rows[1]["token_ids"] == [1, 2, 3]
    assert rows[1]["behaviour_logprobs"] == [-1.0, -2.0, -3.0]
    assert rows[1]["reference_logprobs"] == [-1.5, -2.5, -3.5]
    assert rows[1]["reward_parts"] == [
        {"name": "a", "value": 0.5, "weight": 0.0},
        {"name": "b", "value": 1.0, "weight": 1.0},
    ]
    assert rows[3]["reference_logprobs"] is None
    assert rows[0]["image_hash"] == image_hash((png(),))
    assert rows[0]["sampling"]["seed"] == 7


def test_duckdb_pandas_and_datasets_open_the_log_as_it_is(log: Path, tmp_path: Path) -> None:
    query = f"select max(reward), list_filter(reward_parts, lambda p: p.name = 'b')[1].value from '{log}' group by all"
    assert (1.0, 1.0) in duckdb.sql(query).fetchall()
    assert pd.read_parquet(log)["caption"].tolist()[0] == "greedy words"
    loaded = load_dataset("parquet", data_files=str(log), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded[2]["token_ids"] == [1, 2, 3]
