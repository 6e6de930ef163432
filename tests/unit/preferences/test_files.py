"""Files of preferences: both kinds hold the same, and what is wrong with one is told by row."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmrl_ray.data.images import image_hash
from mmrl_ray.errors import PreferenceError
from mmrl_ray.preferences.files import read_preferences, write_preferences
from mmrl_ray.preferences.schema import PREFERENCE_SCHEMA, Pair, Preference
from mmrl_ray.preferences.store import PreferenceStore, Written
from tests.unit.preferences.examples import pair, picture, preference

MOMENT = datetime(2030, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
ITEMS: list[Pair | Preference] = [
    replace(preference("b", ratings=(0.25, 1.0), first="b"), created=MOMENT),
    preference("tie", "bob", shade=300),
    pair("", "an empty one beside", shade=2),
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_what_is_written_is_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "out" / f"votes.{kind}"
    assert write_preferences(file, ITEMS) == 3
    assert list(read_preferences(file)) == ITEMS
    assert [item.pair.image if isinstance(item, Preference) else item.image for item in read_preferences(file)] == [
        picture(0),
        picture(300),
        picture(2),
    ]
    with pytest.raises(PreferenceError, match="exists already"):
        write_preferences(file, ITEMS)
    assert sorted(each.name for each in file.parent.iterdir() if each.name != "images") == [file.name]


def test_export_and_import_go_round_between_stores_of_both_kinds(store: PreferenceStore, tmp_path: Path) -> None:
    store.add([replace(each, created=MOMENT) if isinstance(each, Preference) else each for each in ITEMS])
    write_preferences(tmp_path / "a.parquet", [*store.preferences(pictures=True), *store.unlabelled(pictures=True)])
    with PreferenceStore(f"sqlite:///{tmp_path / 'second.db'}") as second:
        assert second.add(read_preferences(tmp_path / "a.parquet")) == Written(new=2, pairs=3)
        assert second.add(read_preferences(tmp_path / "a.parquet")) == Written(same=2)
        assert list(second.preferences()) == list(store.preferences())
        write_preferences(tmp_path / "b.jsonl", second.preferences(pictures=True))
    assert store.add(read_preferences(tmp_path / "b.jsonl")) == Written(same=2)


def test_other_programs_open_the_parquet(tmp_path: Path) -> None:
    import datasets

    file = tmp_path / "votes.parquet"
    write_preferences(file, ITEMS)
    assert pq.read_schema(file).equals(PREFERENCE_SCHEMA)
    rows = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["image"].size == (4, 4)
    assert rows["choice"][:] == ["b", "tie", None]


def _parquet(file: Path, **columns: Any) -> None:
    good: dict[str, Any] = {
        "image": [{"bytes": picture(), "path": None}] * 3,
        "caption_a": ["a red square", "a square", "red"],
        "caption_b": ["b", "c", "d"],
        "choice": ["a", "b", "a"],
        "rater": ["ann"] * 3,
    }
    pq.write_table(pa.table({name: value for name, value in (good | columns).items() if value is not None}), file)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption_b": ["b", "a square", "d"]}, r"votes\.parquet, row 2: both captions are 'a square'"),
        ({"choice": ["a", "B", "a"]}, "row 2: choice 'B' is none of a, b, tie"),
        ({"rater": ["ann", None, "ann"]}, "row 2: rater ''"),
        ({"rating_a": [0.5, float("nan"), None]}, "row 2: rating_a is nan"),
        ({"image": [{"bytes": b"GIF89", "path": None}] * 3}, "row 1: image: "),
        ({"image": [{"bytes": None, "path": None}] * 3}, "row 1: image: the row has neither"),
        ({"image": [{"bytes": None, "path": "../x.png"}] * 3}, "row 1: image: path '../x.png' is refused"),
        ({"image": [{"bytes": None, "path": "gone.png"}] * 3}, "row 1: image: file 'gone.png' cannot be read: No such"),
        ({"choice": [None, "a", "a"]}, "row 1: rater without a choice"),
        ({"caption_b": None}, "column caption_b is missing; a file of preferences has id, image, prompt"),
        ({"choice": [["a"], ["b"], ["a"]]}, r"column choice is list<.*>; it must be string"),
    ],
)
def test_a_bad_row_of_parquet_is_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    _parquet(tmp_path / "votes.parquet", **columns)
    with (
        PreferenceStore(f"sqlite:///{tmp_path / 's.db'}") as store,
        pytest.raises(PreferenceError, match=message),
    ):
        store.add(read_preferences(tmp_path / "votes.parquet"))
    with PreferenceStore(f"sqlite:///{tmp_path / 's.db'}") as store:
        assert store.count_pairs() == 0


LINE: dict[str, Any] = {"image": "p.png", "caption_a": "x", "caption_b": "y", "choice": "a", "rater": "ann"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"votes\.jsonl, line 2: no JSON"),
        ("[1]", r"line 2: \[1\] is no JSON object"),
        ({"captionA": "x"}, "line 2: unknown key 'captionA'; there are id, image"),
        ({"image": {"bytes": "%%"}}, "line 2: image or created cannot be read"),
        ({"created": "yesterday"}, "line 2: image or created cannot be read"),
        ({"created": "2030-01-01T00:00:00"}, "line 2: created 2030-01-01 00:00:00 has no time zone"),
        ({"image": f"sha256:{'0' * 64}"}, "line 2: picture 0{64} is unknown to the store"),
        ({"caption_a": 3}, "line 2: caption_a 3 is no text"),
        ({"rating_b": "NaN"}, "line 2: rating_b is 'NaN'"),
        ({"rating_b": 1.5}, "line 2: rating_b=1.5 is off the scale of sqlite:.*, 0 to 1"),
        ({"image": None}, "line 2: image: the row has neither"),
        ({"image": "votes.jsonl"}, "line 2: image: "),
    ],
)
def test_a_bad_line_is_named_and_left_out_only_when_asked(tmp_path: Path, line: Any, message: str) -> None:
    (tmp_path / "p.png").write_bytes(picture())
    bad = line if isinstance(line, str) else json.dumps({**LINE, **line})
    good = [json.dumps({**LINE, "caption_b": other}) for other in ("y", "z")]
    (tmp_path / "votes.jsonl").write_text("\n".join([good[0], bad, "", good[1]]))
    url = f"sqlite:///{tmp_path / 's.db'}"
    with PreferenceStore(url) as store, pytest.raises(PreferenceError, match=message):
        store.add(read_preferences(tmp_path / "votes.jsonl"))
    told: list[PreferenceError] = []
    with PreferenceStore(url) as store:
        assert store.count_pairs() == 0
        written = store.add(read_preferences(tmp_path / "votes.jsonl", told.append), on_bad=told.append)
        assert (written.new, len(told)) == (2, 1)


def test_pictures_may_be_named_or_sent_in_line(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"image": {"bytes": base64.b64encode(picture()).decode()}},
        {"image": f"sha256:{image_hash([picture()])}", "rater": "bob"},
    ]
    (tmp_path / "votes.jsonl").write_text("\n".join(json.dumps({**LINE, **each}) for each in lines))
    with PreferenceStore(f"sqlite:///{tmp_path / 's.db'}") as store:
        assert store.add(read_preferences(tmp_path / "votes.jsonl")) == Written(new=2, pairs=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "there is no such file"),
        (lambda file: file.write_bytes(b"PAR1 not really"), "cannot be read as Parquet"),
    ],
)
def test_what_is_no_file_of_preferences(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "x.parquet")
    with pytest.raises(PreferenceError, match=message):
        list(read_preferences(tmp_path / "x.parquet"))
    with pytest.raises(PreferenceError, match=r"ends in \.parquet or \.jsonl"):
        list(read_preferences(tmp_path / "x.csv"))
    with pytest.raises(PreferenceError, match="nothing to write"):
        write_preferences(tmp_path / "y.parquet", [])
    assert not (tmp_path / "y.parquet").exists()
