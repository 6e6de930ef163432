from __future__ import annotations

import hashlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from mmrl_ray.errors import RolloutError, RunError
from mmrl_ray.experience.carriers import GroupKey, PlannedGroup
from mmrl_ray.experience.schema import ROLLOUT_SCHEMA, decode_records, encode_records, group_rows
from mmrl_ray.run_records.rollout_log import Recorder, StepRecord
from mmrl_ray.run_records.run_dir import RunDir
from tests.unit.experience.factories import rollout_group, scored
from tests.unit.rollouts.fakes import png, samples


def planned(key: GroupKey, advantages: tuple[float, ...]) -> PlannedGroup:
    return PlannedGroup(key, "s", 1, advantages, (1.0,) * len(advantages), (2, 3), 5, None, (0.5, 0.75), "group")


def table(*keys: GroupKey, masked: str | None = None, greedy: bool = False) -> bytes:
    made = [replace(scored(masked=masked), key=key) for key in keys]
    group = rollout_group(greedy=greedy)
    return encode_records([row for each in made for row in group_rows("run", each, group)])


def query(run: RunDir, what: str, step: int = 3) -> list[tuple[Any, ...]]:
    path = run.local_path(f"rollouts/step-{step:06d}.parquet")
    return duckdb.sql(f"select {what} from '{path}'").fetchall()


def test_a_step_is_written_in_order_with_what_the_plan_decided(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    recorder = Recorder(run)
    consumed, masked = GroupKey(3, 0, 1), GroupKey(3, 1)
    superseded = GroupKey(3, 0, 0)
    tables = [table(masked, masked="no references"), table(superseded, consumed, greedy=True)]
    record = StepRecord(3, frozenset({consumed, masked}), tables, {consumed: planned(consumed, (0.5, -0.5))}, [])
    recorder.record(record)
    recorder.close()
    rows = query(run, '"index", attempt, completion, advantage, staleness, masked')
    assert rows == [
        (0, 1, -1, None, 1, None),
        (0, 1, 0, 0.5, 1, None),
        (0, 1, 1, -0.5, 1, None),
        (1, 0, 0, None, None, "no references"),
        (1, 0, 1, None, None, "no references"),
    ]
    learnt = query(run, "completion, learning_reward, reward_normalization")
    assert learnt == [(-1, None, "group"), (0, 0.5, "group"), (1, 0.75, "group"), (0, None, None), (1, None, None)]
    assert pa.parquet.read_schema(run.local_path("rollouts/step-000003.parquet")).equals(ROLLOUT_SCHEMA)


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    recorder = Recorder(run)
    for attempt in (0, 1):
        key = GroupKey(3, 0, attempt)
        recorder.record(StepRecord(3, frozenset({key}), [table(key)], {}, []))
        recorder.flush()
        assert query(run, "distinct attempt") == [(attempt,)]
    recorder.close()
    assert query(run, "count(*)") == [(2,)]


def test_images_are_stored_once_under_their_hash(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    recorder = Recorder(run)
    sample = samples(1)[0]
    pair = replace(sample, id="pair", images=(png(0), png(300)))
    for step in (0, 1):
        recorder.record(StepRecord(step, frozenset(), [], {}, [sample, pair]))
    recorder.close()
    digests = [hashlib.sha256(image).hexdigest() for image in (png(0), png(300))]
    listed = [name for name in run.list("images") if name.endswith(".json")]
    assert sorted(set(run.list("images")) - set(listed)) == sorted(f"{digest}.png" for digest in digests)
    assert run.read_bytes(f"images/{digests[1]}.png") == png(300)
    assert run.read_json(f"images/{listed[0]}") == [f"{digest}.png" for digest in digests]


def test_an_error_of_the_background_shows_at_the_next_call(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    (tmp_path / "run" / "rollouts").write_text("a file lies where the folder should be")
    recorder = Recorder(run)
    recorder.record(StepRecord(0, frozenset(), [], {}, []))
    with pytest.raises(RunError, match="rollouts"):
        recorder.flush()
    with pytest.raises(RunError, match="rollouts"):
        recorder.record(StepRecord(1, frozenset(), [], {}, []))
    with pytest.raises(RunError, match="rollouts"):
        recorder.close()


def test_flush_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slowly(rows: bytes) -> pa.Table:
        release.wait(30)
        return decode_records(rows)

    monkeypatch.setattr("mmrl_ray.run_records.rollout_log.decode_records", slowly)
    recorder = Recorder(RunDir.create(tmp_path, "run"))
    recorder.record(StepRecord(0, frozenset(), [encode_records([])], {}, []))
    with pytest.raises(RolloutError, match=r"within 0\.05 s"):
        recorder.flush(timeout_s=0.05)
    release.set()
    recorder.close()
