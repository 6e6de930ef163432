"""Reading: the layout's variants, the seeded order, exact continuation, quarantine."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmrl_ray.data.images import decode_image
from mmrl_ray.data.samples import (
    Quarantine,
    QuarantineRecord,
    Sample,
    SampleStream,
    dataset_fingerprint,
    iter_references,
    read_split,
    write_parquet,
)
from mmrl_ray.data.shards import ParquetDataset
from mmrl_ray.errors import DataError, ImageError, QuarantineError
from tests.unit.data.pictures import encode, picture, sample

ROWS = 37
PINNED = ["s5", "s1", "s0", "s3", "s4", "s2", "s7", "s6", "s8", "s9", "s5", "s8"]
BROKEN = {5: b'{"an": "object"}', 20: picture(20)[:40], 21: b""}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, row groups of three, three broken rows."""
    path = tmp_path_factory.mktemp("dataset") / "train"
    rows = [sample(i, images=(BROKEN.get(i, picture(i)),)) for i in range(ROWS)]
    write_parquet(path, rows, rows_per_group=3, shards=3)
    return path


def stream(path: Path, seed: int = 0, budget: int = 10, **options: Any) -> SampleStream:
    return SampleStream(path, prompt="What is this?", seed=seed, max_quarantined=budget, **options)


def ids(samples: list[Sample]) -> list[str]:
    return [each.id for each in samples]


def table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


# -- order and continuation --------------------------------------------------------------------------------------------


def test_an_epoch_is_each_good_row_once_in_another_order(dataset: Path) -> None:
    good = {f"s{i}" for i in range(ROWS) if i not in BROKEN}
    source = stream(dataset)
    epochs = [ids(source.take(len(good))) for _ in range(3)]
    assert [set(epoch) for epoch in epochs] == [good] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sorted(epochs[0]) != epochs[0]


def test_the_order_follows_from_the_seed_alone(dataset: Path) -> None:
    assert ids(stream(dataset, seed=3).take(50)) == ids(stream(dataset, seed=3).take(50))
    assert ids(stream(dataset, seed=3).take(50)) != ids(stream(dataset, seed=4).take(50))


def test_the_order_is_pinned(tmp_path: Path) -> None:
    """Literal: a change of the shuffle would silently change every resumed run."""
    write_parquet(tmp_path / "d", [sample(i) for i in range(10)], rows_per_group=2)
    assert ids(stream(tmp_path / "d", seed=7).take(12)) == PINNED


def test_rows_are_mixed_across_shards(dataset: Path) -> None:
    """The first window of row groups must not be the first shard."""
    firsts = [{int(name[1:]) // 13 for name in ids(stream(dataset, seed=seed).take(10))} for seed in range(8)]
    assert sum(len(shards) > 1 for shards in firsts) >= 4


@given(before=st.integers(0, 120), after=st.integers(1, 80), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_continues_exactly_anywhere(dataset: Path, before: int, after: int, seed: int) -> None:
    one = stream(dataset, seed=seed)
    one.take(before)
    saved = json.loads(json.dumps(one.state()))
    other = stream(dataset, seed=seed)
    other.take(before // 3)  # a used stream can be set back too
    other.restore(saved)
    assert other.state() == saved
    assert ids(other.take(after)) == ids(one.take(after))
    assert other.state() == one.state()


def test_taking_in_pieces_is_taking_at_once(dataset: Path) -> None:
    pieces = stream(dataset)
    assert ids([each for n in (1, 7, 0, 30, 2) for each in pieces.take(n)]) == ids(stream(dataset).take(40))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"dataset": "0" * 64}, {"version": 0}, {"position": 38}, {"epoch": -1}]
)
def test_a_state_of_another_run_is_refused(dataset: Path, change: dict[str, Any]) -> None:
    source = stream(dataset)
    with pytest.raises(DataError, match="cannot continue in"):
        source.restore({**source.state(), **change})


def test_only_a_window_of_row_groups_is_in_memory(dataset: Path) -> None:
    source = stream(dataset)
    for _ in range(60):
        source.take(1)
        assert 1 <= len(source.dataset._cache) <= 4


def test_large_row_groups_are_held_one_at_a_time(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrl_ray.data.samples.WINDOW_BYTES", 1)
    source = stream(dataset)
    taken = []
    for _ in range(ROWS - len(BROKEN)):
        taken += source.take(1)
        assert len(source.dataset._cache) == 1
    assert len(set(ids(taken))) == ROWS - len(BROKEN)


# -- quarantine --------------------------------------------------------------------------------------------------------


def test_broken_images_are_quarantined_once_with_their_reason(dataset: Path) -> None:
    heard: list[QuarantineRecord] = []
    source = stream(dataset, on_quarantine=heard.append)
    source.take(3 * ROWS)
    assert {record.sample_id for record in heard} == {f"s{i}" for i in BROKEN}
    assert len(heard) == len(source.quarantine) == 3
    reasons = {record.sample_id: record.reason for record in heard}
    assert reasons["s5"].startswith("JSON instead of an image")
    assert reasons["s20"].startswith("broken PNG image")
    assert all(record.where.endswith(f" row {int(record.sample_id[1:]) % 13}") for record in heard)


def test_a_picture_is_decoded_once_and_a_broken_row_never_comes(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def decode(image: bytes) -> object:
        decoded.append(image)
        return decode_image(image)

    monkeypatch.setattr("mmrl_ray.data.samples.decode_image", decode)
    source = stream(dataset)
    first = {sample.id for sample in source.take(source.rows - 3)}
    once = len(decoded)
    again = {sample.id for sample in source.take(2 * (source.rows - 3))}
    assert (source.epoch, again) == (2, first)
    assert len(decoded) == once


def test_past_the_budget_is_an_error_that_shows_reasons(dataset: Path) -> None:
    with pytest.raises(QuarantineError, match=r"3 broken samples, but at most 2 .*JSON instead of an image"):
        stream(dataset, budget=2).take(2 * ROWS)
    assert len(stream(dataset, budget=3).take(2 * ROWS)) == 2 * ROWS


def test_a_sample_found_broken_later_does_not_come_again(dataset: Path) -> None:
    source = stream(dataset)
    source.quarantine.add("s8", "the processor refused it")
    counts = Counter(ids(source.take(2 * (ROWS - 4))))
    assert "s8" not in counts
    assert set(counts.values()) == {2}


def test_all_rows_broken_is_an_error(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", image=[b"x", b"y"])
    with pytest.raises(DataError, match=r"every row of .*a.parquet is quarantined: a.parquet row \d: .*PNG, JPEG"):
        stream(path).take(1)
    with pytest.raises(DataError, match=r"no row of .*a.parquet can be used: a.parquet row 0: "):
        read_split(path, prompt="P", quarantine=Quarantine(5))


def test_rows_that_name_pictures_of_another_machine_say_where_they_look(tmp_path: Path) -> None:
    cells = [
        {"bytes": cell, "path": f"{place}{i}.png"}
        for i, (cell, place) in enumerate([(None, "/home/somebody/"), (b"", "pictures/"), (None, "pictures/")])
    ]
    path = table(tmp_path / "moved.parquet", image=cells)
    with pytest.raises(DataError) as caught:
        stream(path).take(1)
    assert f"every row of {path} is quarantined" in str(caught.value)
    assert f"'/home/somebody/0.png' is refused: it must be relative and stay inside the data set {tmp_path}" in str(
        caught.value
    )
    assert f"image file pictures/1.png is missing in {tmp_path}" in str(caught.value)


def test_rows_of_one_id_are_known_by_their_places(tmp_path: Path) -> None:
    """A row a caption is a common layout: one that is left out leaves its siblings in, and each counts."""
    rows = [sample(i, id="dog", prompt="What is this?") for i in range(6)]
    write_parquet(tmp_path / "d", rows, shards=2)
    source = stream(tmp_path / "d")
    taken = source.take(6)
    assert len({each.key for each in taken}) == 6
    assert taken == [rows[each.metadata["number"]] for each in taken], "where it lies is no part of what it says"
    for each in taken[:2]:
        source.quarantine.add(each.id, "the processor refused it", each.place)
    assert len(source.quarantine) == 2
    left = {each.place for each in taken[2:]}
    other = stream(tmp_path / "d")
    other.restore(json.loads(json.dumps(source.state())))
    for each in (source, other):
        counts = Counter(again.place for again in each.take(8))
        assert set(counts) == left
        assert set(counts.values()) == {2}


def test_quarantine_state_goes_through_json() -> None:
    one = Quarantine(5)
    one.add("a", "why", "shard row 1")
    one.add("a", "why", "shard row 2")
    one.add("b", "late")
    heard: list[QuarantineRecord] = []
    other = Quarantine(0, heard.append)
    other.restore(json.loads(json.dumps(one.state())))
    assert other.records == one.records
    assert not heard
    assert other.holds("b", "anywhere")
    assert other.holds("x", "shard row 2")
    assert not other.holds("a", "shard row 3")


# -- the layout --------------------------------------------------------------------------------------------------------


def test_reads_what_was_written(tmp_path: Path) -> None:
    rows = [sample(0), sample(1, references=(), metadata={}), sample(2, prompt="Say it in French.")]
    write_parquet(tmp_path / "one.parquet", rows)
    expected = [sample(0, prompt="P"), sample(1, references=(), metadata={}, prompt="P"), rows[2]]
    assert read_split(tmp_path / "one.parquet", prompt="P") == expected
    assert read_split(tmp_path / "one.parquet", prompt="P", limit=2) == expected[:2]


@pytest.mark.parametrize(
    ("column", "cell", "expected"),
    [
        ("captions", ["a dog", " a cat ", None, ""], ("a dog", "a cat")),
        ("references", ["a dog"], ("a dog",)),
        ("caption", "a dog", ("a dog",)),
        ("text", "a dog", ("a dog",)),
        ("caption", ["a dog", "a cat"], ("a dog", "a cat")),
        ("other", ["a dog"], ()),
    ],
)
def test_captions_under_any_usual_name(tmp_path: Path, column: str, cell: Any, expected: tuple[str, ...]) -> None:
    path = table(tmp_path / "d.parquet", image=[{"bytes": picture(), "path": None}], **{column: [cell]})
    assert read_split(path, prompt="P")[0].references == expected


def test_images_ids_prompts_and_metadata_in_their_variants(tmp_path: Path) -> None:
    cell = {"bytes": picture(1), "path": "ignored.png"}
    path = table(
        tmp_path / "d.parquet",
        id=pa.array([391895, None, 7]),
        images=pa.array([[cell], [cell, cell], [cell]]),
        prompt=pa.array(["Hello?", None, "  "]).dictionary_encode(),
        metadata=[{"a": 1}, None, {"a": None}],
    )
    first, second, third = read_split(path, prompt="P")
    assert [first.id, second.id, third.id] == ["391895", "d:1", "7"]
    assert [len(each.images) for each in (first, second, third)] == [1, 2, 1]
    assert [first.prompt, second.prompt, third.prompt] == ["Hello?", "P", "P"]
    assert [first.metadata, second.metadata, third.metadata] == [{"a": 1}, {}, {"a": None}]


def test_images_by_path_stay_inside_the_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "img").mkdir(parents=True)
    (folder / "img" / "a.png").write_bytes(picture(3))
    (tmp_path / "secret.png").write_bytes(picture(4))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    outside = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "img/../../secret.png",
        "link.png",
        "c:/x.png",
        "a\\b.png",
    ]
    paths = ["img/a.png", *outside, "img/none.png", "img", None]
    table(folder / "d.parquet", image=pa.array([{"bytes": None, "path": path} for path in paths]))
    quarantine = Quarantine(20)
    samples = read_split(folder, prompt="P", quarantine=quarantine)
    assert [each.images for each in samples] == [(picture(3),)]
    reasons = [record.reason for record in quarantine.records]
    assert all("is refused" in reason for reason in reasons[: len(outside)])
    assert all("is missing" in reason for reason in reasons[len(outside) : -1])
    assert reasons[-1] == "the row has neither image bytes nor a path"


def test_broken_cells_are_row_errors(tmp_path: Path) -> None:
    image = {"bytes": picture(), "path": None}
    path = table(
        tmp_path / "d.parquet", image=[image, image, None, image], metadata=["{", "[1]", "{}", '{"fine": true}']
    )
    quarantine = Quarantine(5)
    assert [each.metadata for each in read_split(path, prompt="P", quarantine=quarantine)] == [{"fine": True}]
    assert [record.reason.split(":")[0] for record in quarantine.records] == [
        "metadata is no JSON",
        "metadata must be a JSON object, not list",
        "the row has neither image bytes nor a path",
    ]
    with pytest.raises(DataError, match=r"d\.parquet row 0 \(d:0\): metadata is no JSON"):
        read_split(path, prompt="P")


def test_a_broken_row_of_a_split_is_named(dataset: Path) -> None:
    with pytest.raises(ImageError, match=r"part-00000-of-00003.parquet row 5 \(s5\): JSON instead"):
        read_split(dataset, prompt="P")
    assert len(read_split(dataset, prompt="P", limit=5)) == 5


def test_references_without_images(dataset: Path, tmp_path: Path) -> None:
    assert list(iter_references(dataset)) == [(f"reference {i}", "another") for i in range(ROWS)]
    with pytest.raises(DataError, match="has no references"):
        iter_references(table(tmp_path / "d.parquet", image=[b"x"]))


def test_another_file_system_by_uri(dataset: Path) -> None:
    local, uri = SampleStream(dataset, prompt="P", seed=0, max_quarantined=9), dataset.as_uri()
    remote = SampleStream(uri, prompt="P", seed=0, max_quarantined=9)
    assert remote.take(20) == local.take(20)
    remote.restore(local.state())


# -- a data set that cannot be used ------------------------------------------------------------------------------------


def test_missing_and_empty_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data at .*/nowhere: there is no such file or folder"):
        ParquetDataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \*.parquet files in folder"):
        ParquetDataset(tmp_path)
    with pytest.raises(DataError, match="has no rows"):
        ParquetDataset(table(tmp_path / "empty.parquet", image=pa.array([], pa.binary())))
    with pytest.raises(DataError, match="nosuch://x is no location that pyarrow can open"):
        ParquetDataset("nosuch://x")


def test_missing_columns_are_named_with_those_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column `image` .* its columns are: picture, text"):
        ParquetDataset(table(tmp_path / "a.parquet", picture=[b"x"], text=["t"]))
    with pytest.raises(DataError, match=r"column `image` of .* is string; it must be struct<bytes, path>"):
        ParquetDataset(table(tmp_path / "b.parquet", image=["a.png"]))
    with pytest.raises(DataError, match=r"column `caption` of .* is int64; it must be string or list<string>"):
        ParquetDataset(table(tmp_path / "c.parquet", image=[b"x"], caption=[3]))
    pq.write_table(pa.table([[b"x"], [b"y"]], names=["image", "image"]), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"several columns `image`; keep one"):
        ParquetDataset(tmp_path / "d.parquet")


def test_shards_that_differ_or_are_missing(dataset: Path, tmp_path: Path) -> None:
    table(tmp_path / "d" / "a.parquet", image=[b"x"], text=["t"])
    table(tmp_path / "d" / "b.parquet", image=[b"x"], caption=["t"])
    with pytest.raises(DataError, match=r"a.parquet has columns image, text, but b.parquet has image, caption"):
        ParquetDataset(tmp_path / "d")
    for name in ("part-00000-of-00003.parquet", "part-00002-of-00003.parquet"):
        (tmp_path / name).write_bytes((dataset / name).read_bytes())
    with pytest.raises(DataError, match="2 of 3 shards of 'part': number 1 is missing"):
        ParquetDataset(tmp_path)


def test_broken_parquet_is_an_error_and_no_quarantine(dataset: Path, tmp_path: Path) -> None:
    content = bytearray((dataset / "part-00001-of-00003.parquet").read_bytes())
    (tmp_path / "cut.parquet").write_bytes(content[:-30])
    with pytest.raises(DataError, match=r"cut.parquet cannot be read as Parquet"):
        ParquetDataset(tmp_path / "cut.parquet")


def test_a_flipped_byte_on_disk_is_found_by_the_page_checksum(tmp_path: Path) -> None:
    image = encode(Image.effect_noise((64, 64), 80))  # noise, so that Snappy stores it as it is
    write_parquet(tmp_path / "good.parquet", [sample(0, images=(image,))])
    content = bytearray((tmp_path / "good.parquet").read_bytes())
    content[content.index(image[100:200])] ^= 1
    (tmp_path / "flipped.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"row group 0 of .*flipped.parquet cannot be read: .*(CRC|checksum)"):
        stream(tmp_path / "flipped.parquet").take(1)


def test_the_fingerprint_sees_content_and_shards(dataset: Path, tmp_path: Path) -> None:
    # Of noise neither sizes nor extremes in a footer tell that one byte differs.
    noise, other_noise = random.Random(0).randbytes(500), bytearray(random.Random(0).randbytes(500))
    other_noise[250] ^= 1

    def written(name: str, change: dict[str, Any] | None = None, **options: Any) -> str:
        rows = [sample(i, **{"images": (noise,), **(change or {})}) if i == 3 else sample(i) for i in range(6)]
        write_parquet(tmp_path / name, rows, **options)
        return dataset_fingerprint(tmp_path / name)

    first = written("a")
    assert written("b") == first
    others = [
        written("c", {"references": ("reference 3", "anothes")}),
        written("d", {"images": (bytes(other_noise),)}),
        written("e", rows_per_group=2),
        written("f", shards=2),
    ]
    assert len({first, *others}) == 5
