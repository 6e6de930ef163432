"""Rows of preferences and ratings: what is read, and what is left out with its reason."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmrl_ray.config.reward_model import RewardDataSection
from mmrl_ray.data.images import image_hash
from mmrl_ray.data.samples import Quarantine
from mmrl_ray.errors import DataError, QuarantineError
from mmrl_ray.preferences.schema import PREFERENCE_SCHEMA
from mmrl_ray.reward_model.data import Batches, Judgement, RewardData, read_judgements
from tests.unit.data.pictures import picture


def row(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "id": "r",
        "image": {"bytes": picture(1), "path": None},
        "prompt": "",
        "caption_a": "a red circle",
        "caption_b": "a blue circle",
        "choice": "a",
        "source": "scenes:colour/train-000001",
    }
    return {**fields, **changes}


def write(folder: Path, *rows: dict[str, Any]) -> str:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=PREFERENCE_SCHEMA), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def read(
    location: str, budget: int = 99, scale: tuple[float, float] = (0.0, 1.0)
) -> tuple[list[Judgement], Quarantine]:
    quarantine = Quarantine(budget)
    section = RewardDataSection(train=location, rating_scale=scale)
    return read_judgements(location, section, quarantine), quarantine


def test_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(picture(2))
    rows = [
        row(rating_a=0.75, rating_b=0.0),
        row(image={"bytes": None, "path": "b.png"}, choice="tie", source=None),
        row(image={"bytes": None, "path": f"sha256:{image_hash((picture(1),))}"}, choice="b", source="run@3/s"),
        row(choice=None, rating_b=1.0, caption_a=""),
    ]
    got, quarantine = read(write(tmp_path, *rows))
    assert len(quarantine) == 0
    assert got == [
        Judgement((picture(1),), "a red circle", "a blue circle", 1.0, 0.75, 0.0, "scenes:colour"),
        Judgement((picture(2),), "a red circle", "a blue circle", 0.5, part="unnamed"),
        Judgement((picture(1),), "a red circle", "a blue circle", 0.0, part="run"),
        Judgement((picture(1),), "", "a blue circle", None, None, 1.0, "scenes:colour"),
    ]


BAD = [
    (row(image={"bytes": None, "path": "sha256:" + "0" * 64}), "unknown image sha256:000"),
    (row(image={"bytes": None, "path": "missing.png"}), "image file missing.png is missing"),
    (row(image={"bytes": None, "path": "../b.png"}), "is refused"),
    (row(image={"bytes": None, "path": None}), "the row has no image"),
    (row(image={"bytes": b"<html>", "path": None}), "HTML instead of an image"),
    (row(caption_b="a red circle"), "both captions are 'a red circle'"),
    (row(choice="c"), "choice 'c' is none of a, b and tie"),
    (row(choice=None), "neither a choice nor a rating"),
    (row(rating_a=1.5), "rating_a=1.5 is outside the scale from 0 to 1"),
    (row(rating_b=-0.1), "rating_b=-0.1 is outside the scale"),
    (row(rating_a=math.nan), "rating_a is nan"),
    (row(rating_b=math.inf), "rating_b is inf"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_left_out_with_its_reason(bad: dict[str, Any], reason: str, tmp_path: Path) -> None:
    got, quarantine = read(write(tmp_path, row(), bad, row(choice="b")))
    assert [each.preferred for each in got] == [1.0, 0.0]
    (record,) = quarantine.records
    assert reason in record.reason
    assert record.where.endswith("rows.parquet row 1")


def test_too_many_bad_rows_or_none_good(tmp_path: Path) -> None:
    location = write(tmp_path, row(), *(bad for bad, _ in BAD))
    with pytest.raises(QuarantineError, match="4 broken samples, but at most 3"):
        read(location, budget=3)
    with pytest.raises(DataError, match="has no good row; the first is left out because: unknown image"):
        read(write(tmp_path, BAD[0][0]))


def test_another_scale(tmp_path: Path) -> None:
    got, quarantine = read(write(tmp_path, row(rating_a=4.0), row(rating_a=6.0)), scale=(1.0, 5.0))
    assert [each.rating_a for each in got] == [4.0]
    assert len(quarantine) == 1


@pytest.mark.parametrize(
    ("dropped", "message"),
    [(["caption_b"], "no column `caption_b`"), (["choice", "rating_a", "rating_b"], "no column `choice` or")],
)
def test_missing_columns(dropped: list[str], message: str, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row()], schema=PREFERENCE_SCHEMA).drop_columns(dropped)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=message):
        read(str(tmp_path))


@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3])
def test_ratings_that_are_all_the_same_like_nothing(value: float) -> None:
    judgements = [Judgement((picture(i),), "x", "y", None, value, value, "p") for i in range(3)]
    data = RewardData.of_judgements(judgements)
    assert data.liked() == [False] * 6
    assert data.center_and_spread() == (pytest.approx(value), 1.0)


def test_arrays_and_batches() -> None:
    one, two = (picture(1),), (picture(2),)
    judgements = [
        Judgement(one, "x", "y", 1.0, 0.5, None, "p"),
        Judgement(one, "y", "z", 0.5, None, 0.25, "q"),
        Judgement(two, "x", "y", None, 0.75, None, "p"),
    ]
    data = RewardData.of_judgements(judgements)
    assert (data.pictures, data.captions, data.of) == ([one, two], ["x", "y", "z", "x", "y"], [0, 0, 0, 1, 1])
    assert (data.pairs, data.preferred, data.pair_parts) == ([(0, 1), (1, 2)], [1.0, 0.5], ["p", "q"])
    assert (data.rated, data.ratings, data.rating_parts) == ([0, 2, 3], [0.5, 0.25, 0.75], ["p", "q", "p"])
    assert data.liked() == [True, False, False, True, False]
    assert data.vocabulary(2) == ("x", "y")
    assert data.center_and_spread() == pytest.approx((0.5, math.sqrt(1 / 24)))
    assert RewardData().center_and_spread() == (0.0, 1.0)
    batches = Batches(data, 1, seed=0)
    seen = [batches.next() for _ in range(4)]
    for batch in seen:
        captions = [data.captions[i] for i in batch.captions]
        assert [data.of[i] for i in batch.captions] == [data.pictures.index(batch.pictures[0])] * len(captions)
        pairs = [(captions[i], captions[j]) for i, j in batch.pairs.tolist()]
        assert pairs == [tuple(data.captions[c] for c in data.pairs[r]) for r in batch.pair_rows.tolist()]
        assert [captions[i] for i in batch.rated] == [data.captions[data.rated[r]] for r in batch.rating_rows.tolist()]
    assert sorted(batch.pictures[0] for batch in seen[:2]) == sorted(data.pictures)
    assert sorted(batch.pictures[0] for batch in seen[2:]) == sorted(data.pictures)
    again = Batches(data, 1, seed=0)
    assert [again.next().pictures for _ in range(4)] == [batch.pictures for batch in seen]
