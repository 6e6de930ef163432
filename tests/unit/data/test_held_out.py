"""Held-out pictures that training has, found by the content of their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmrl_ray.data.held_out import overlap_with_data, overlap_with_hashes, same_place
from mmrl_ray.data.images import image_hash
from mmrl_ray.data.samples import write_parquet
from mmrl_ray.data.shards import ParquetDataset
from tests.unit.data.pictures import picture, sample


def test_byte_equal_pictures_are_found_whatever_their_rows_are_called(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train", [sample(i) for i in range(20)], rows_per_group=4, shards=2)
    held_out = [sample(100), sample(3, id="other"), sample(7, images=(picture(7, size=(9, 9)),)), sample(19, id="e")]
    found = overlap_with_data(held_out, str(tmp_path / "train"))
    assert (found.found, found.samples, found.looked_at, found.rows) == (("other", "e"), 4, 20, 20)
    assert found.share == 0.5
    assert "2 of 4 held-out pictures (50%) are trained on: other, e;" in str(found)
    assert "all 20 rows compared" in str(found)
    clean = overlap_with_data(held_out[:1], str(tmp_path / "train"))
    assert str(clean).startswith("none of 1 held-out pictures is in ")
    hashes = [image_hash(each.images) for each in map(sample, range(20))]
    assert overlap_with_hashes(held_out, hashes, "the log").found == found.found


def test_several_pictures_and_those_beside_the_shards(tmp_path: Path) -> None:
    """Files are read only where their length is that of a held-out picture; a row that names none is passed over."""
    (tmp_path / "d" / "img").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "d" / "img" / f"{number}.png").write_bytes(picture(number, size=(8 + number, 8)))
    paths = [["img/0.png"], ["img/1.png", "img/2.png"], ["img/gone.png"], ["/elsewhere/0.png"]]
    cells = [[{"bytes": None, "path": path} for path in row] for row in paths]
    pq.write_table(pa.table({"images": pa.array(cells)}), tmp_path / "d" / "a.parquet")
    one, two = picture(1, size=(9, 8)), picture(2, size=(10, 8))
    held_out = [sample(0, id="pair", images=(one, two)), sample(1, id="turned", images=(two, one))]
    assert overlap_with_data(held_out, str(tmp_path / "d")).found == ("pair",)
    dataset = ParquetDataset(tmp_path / "d")
    assert list(dataset.iter_images(dataset.groups[0], {len(one) + len(two)})) == [(one, two)]
    assert list(dataset.iter_images(dataset.groups[0], set())) == []


def test_no_more_is_read_than_allowed_and_it_says_how_much(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(40)]
    write_parquet(tmp_path / "train", rows, rows_per_group=4)
    group = ParquetDataset(tmp_path / "train").groups[0].nbytes
    found = overlap_with_data(rows, str(tmp_path / "train"), read_bytes=3 * group)
    assert found.rows == 40
    assert found.looked_at in (12, 16), "row groups differ by a few bytes"
    assert len(found.found) == found.looked_at
    assert f"{found.looked_at} of 40 rows, as many as are read for this" in str(found)


def test_the_same_place_by_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert same_place("data", str(tmp_path / "data"))
    assert same_place("./link/", (tmp_path / "data").as_uri())
    assert not same_place("data", "other")
    assert not same_place("nosuch://a", "data")


def test_a_place_is_no_part_of_what_a_sample_says() -> None:
    assert replace(sample(1), place="a row 1") == sample(1)
    assert replace(sample(1), place="a row 1").key == "a row 1"
    assert sample(1).key == "s1"
