"""Writing: the layout that HF `datasets` reads, and nothing half-written."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmrl_ray.data.samples import Sample, ShardWriter, read_split, write_parquet
from mmrl_ray.data.shards import ParquetDataset
from mmrl_ray.errors import DataError
from tests.unit.data.pictures import encode, picture, sample


def test_hugging_face_datasets_decodes_the_images(tmp_path: Path) -> None:
    import datasets

    write_parquet(tmp_path / "one", [sample(i) for i in range(5)], shards=2)
    write_parquet(tmp_path / "many", [sample(i, images=(picture(i), picture(i + 1))) for i in range(3)])
    load = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    one = datasets.load_dataset("parquet", data_files=str(tmp_path / "one" / "*.parquet"), **load)
    many = datasets.load_dataset("parquet", data_files=str(tmp_path / "many" / "*.parquet"), **load)
    assert isinstance(one.features["image"], datasets.Image)
    assert [row["image"].getpixel((0, 0)) for row in one] == [(i, 0, 99) for i in range(5)]
    assert [row["references"] for row in one] == [[f"reference {i}", "another"] for i in range(5)]
    assert [[image.getpixel((0, 0))[0] for image in row["images"]] for row in many] == [[0, 1], [1, 2], [2, 3]]


def test_what_datasets_writes_is_read(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    rows = {"image": [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3)], "caption": [["a"], ["b", "c"], []]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "d.parquet"))
    samples = read_split(tmp_path / "d.parquet", prompt="P")
    assert [each.references for each in samples] == [("a",), ("b", "c"), ()]
    assert [each.id for each in samples] == ["d:0", "d:1", "d:2"]


def test_shards_and_row_groups_are_as_asked(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(10)]
    assert write_parquet(tmp_path / "d", rows, rows_per_group=2, shards=3, metadata={"mine": "ö"}) == 10
    dataset = ParquetDataset(tmp_path / "d")
    assert [shard.name for shard in dataset.shards] == [f"part-0000{i}-of-00003.parquet" for i in range(3)]
    assert [(group.shard, group.first_row, group.rows) for group in dataset.groups] == [
        (0, 0, 2), (0, 2, 2), (1, 0, 2), (1, 2, 2), (2, 0, 2)
    ]  # fmt: skip
    assert dataset.key_value_metadata["mine"] == "ö"
    assert [each.id for each in read_split(tmp_path / "d", prompt="")] == [f"s{i}" for i in range(10)]


def test_a_row_group_is_closed_early_when_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrl_ray.data.writing._GROUP_BYTES", 3 * len(picture()))
    write_parquet(tmp_path / "d.parquet", [sample(i, images=(picture(),)) for i in range(7)])
    metadata = pq.read_metadata(tmp_path / "d.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [3, 3, 1]


@pytest.mark.parametrize("name", ["folder", "file.parquet"])
def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, name: str) -> None:
    def rows() -> Iterator[Sample]:
        yield from (sample(i) for i in range(250))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_parquet(tmp_path / "new" / name, rows())
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("name", ["folder", "file.parquet"])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands in for the disk: the write fails in the same place."""
    noise = encode(Image.effect_noise((200, 200), 90))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
        with pytest.raises(DataError, match=rf"^cannot write .*{name}: .*File too large") as caught:
            write_parquet(tmp_path / name, [sample(i, images=(noise,)) for i in range(20)], rows_per_group=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["folder", "file.parquet"])
def test_what_is_there_is_not_overwritten(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / name, [sample(1)])
    with pytest.raises(DataError, match=f"{name} exists already"):
        write_parquet(tmp_path / name, [sample(2)])
    assert [each.id for each in read_split(tmp_path / name, prompt="")] == ["s1"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_to_write_and_wrong_numbers_of_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no samples"):
        write_parquet(tmp_path / "d", [])
    with pytest.raises(DataError, match="sample s0 has 0 images: write at least one"):
        write_parquet(tmp_path / "d", [sample(0, images=())])
    rows = iter([sample(0), sample(1, images=(picture(), picture()))])
    with pytest.raises(DataError, match="sample s1 has 2 images: write all samples with several_images"):
        write_parquet(tmp_path / "d", rows)
    with pytest.raises(DataError, match="is one file"), ShardWriter(tmp_path / "d.parquet", rows_per_shard=3):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an object store: files are moved one by one, and a reader in between sees that some are missing."""
    monkeypatch.setattr("mmrl_ray.data.writing.is_local", lambda filesystem: False)
    write_parquet(tmp_path / "d", [sample(i) for i in range(6)], shards=3)
    write_parquet((tmp_path / "e.parquet").as_uri(), [sample(9)])
    assert [each.id for each in read_split(tmp_path / "d", prompt="")] == [f"s{i}" for i in range(6)]
    assert [each.id for each in read_split(tmp_path / "e.parquet", prompt="")] == ["s9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "e.parquet"]
