"""Importers, on annotation files made here in each layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmrl_ray.data.importers import ImportSummary, import_coco, import_jsonl
from mmrl_ray.data.samples import Sample, read_split
from mmrl_ray.data.shards import ParquetDataset
from mmrl_ray.errors import DataError, QuarantineError
from tests.unit.data.pictures import picture


def put_images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number, "JPEG" if name.endswith("jpg") else "PNG"))


def put_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def put_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(out: Path) -> list[Sample]:
    return read_split(out, prompt="P")


def coco(tmp_path: Path, count: int = 4) -> tuple[Path, Path]:
    images = tmp_path / "images"
    put_images(images, [f"{i:012d}.jpg" for i in range(count)])
    content = {
        "images": [{"id": 100 + i, "file_name": f"{i:012d}.jpg"} for i in range(count)],
        "annotations": [
            {"id": 10 * i + j, "image_id": 100 + i, "caption": f" caption {j} of {i}.\n"}
            for j in range(3)
            for i in range(count)
        ],
    }
    return put_json(tmp_path / "captions_val.json", content), images


def karpathy(tmp_path: Path) -> tuple[Path, Path]:
    images = tmp_path / "coco"
    rows = [("train", 1), ("restval", 2), ("val", 3), ("test", 4), ("train", 5)]
    put_images(images, [f"train2014/{i}.jpg" for _, i in rows[:-1]] + ["5.jpg"])
    entries = [
        {
            "filepath": "train2014",
            "filename": f"{i}.jpg",
            "split": split,
            "cocoid": i,
            "sentences": [{"raw": f"a {i}", "tokens": ["a", str(i)]}, {"raw": f"b {i}", "tokens": []}],
        }
        for split, i in rows
    ]
    return put_json(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"}), images


# -- COCO --------------------------------------------------------------------------------------------------------------


def test_coco_gathers_the_captions_of_each_image(tmp_path: Path) -> None:
    annotations, images = coco(tmp_path)
    steps: list[tuple[int, int | None]] = []
    out = tmp_path / "out"
    summary = import_coco(annotations, images, out, rows_per_shard=3, progress=lambda *step: steps.append(step))
    assert summary == ImportSummary(str(out), 4, 12, ())
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    samples = read(out)
    assert [each.id for each in samples] == ["100", "101", "102", "103"]
    assert samples[2].references == ("caption 0 of 2.", "caption 1 of 2.", "caption 2 of 2.")
    assert samples[2].images == (picture(2, "JPEG"),)
    assert len(ParquetDataset(out).shards) == 2


@pytest.mark.parametrize(
    ("split", "expected"),
    [(None, ["1", "2", "5"]), ("train", ["1", "5"]), ("val", ["3"]), ("val+test", ["3", "4"])],
)
def test_karpathy_splits(tmp_path: Path, split: str | None, expected: list[str]) -> None:
    file, images = karpathy(tmp_path)
    import_coco(None, images, tmp_path / "out.parquet", karpathy=file, split=split)
    samples = read(tmp_path / "out.parquet")
    assert [each.id for each in samples] == expected
    assert [each.references for each in samples] == [(f"a {i}", f"b {i}") for i in expected]


def test_broken_missing_and_uncaptioned_images_are_left_out(tmp_path: Path) -> None:
    annotations, images = coco(tmp_path, 6)
    (images / f"{1:012d}.jpg").unlink()
    (images / f"{2:012d}.jpg").write_text('{"not": "an image"}')
    content = json.loads(annotations.read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 104]
    content["images"][5]["file_name"] = "../captions_val.json"
    put_json(annotations, content)
    summary = import_coco(annotations, images, tmp_path / "out", max_quarantined=4)
    assert [each.id for each in read(tmp_path / "out")] == ["100", "103"]
    assert summary.rows == 2
    reasons = {record.sample_id: record.reason for record in summary.quarantined}
    assert reasons["101"] == f"image {images / '000000000001.jpg'} is missing"
    assert reasons["102"].endswith("000000000002.jpg: JSON instead of an image: PNG, JPEG, WebP and GIF are accepted")
    assert reasons["104"] == "image 000000000004.jpg has no caption"
    assert "'../captions_val.json' is refused" in reasons["105"]
    with pytest.raises(QuarantineError, match=r"4 broken samples, but at most 3 .*000000000001.jpg is missing"):
        import_coco(annotations, images, tmp_path / "other", max_quarantined=3)
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_an_id_of_two_pictures_is_refused_and_names_both(tmp_path: Path) -> None:
    """Whose the captions are cannot be told; the same picture listed twice is one."""
    annotations, images = coco(tmp_path)
    content = json.loads(annotations.read_text())
    content["images"].append(content["images"][2])
    summary = import_coco(put_json(annotations, content), images, tmp_path / "same")
    assert (summary.rows, summary.references) == (4, 12)
    content["images"][3]["id"] = 101
    with pytest.raises(DataError, match=r"image id 101 is that of two pictures, 000000000001.jpg and 000000000003.jpg"):
        import_coco(put_json(annotations, content), images, tmp_path / "out")
    file, flat = karpathy(tmp_path)
    content = json.loads(file.read_text())
    content["images"][4]["cocoid"] = 1
    with pytest.raises(DataError, match=r"image id 1 is that of two pictures, train2014/1.jpg and train2014/5.jpg"):
        import_coco(None, flat, tmp_path / "out", karpathy=put_json(file, content))


def test_an_image_id_is_the_same_as_number_and_as_text(tmp_path: Path) -> None:
    """Tools write one file's ids as 7, "7" or 7.0; what is neither whole number nor text is refused."""
    annotations, images = coco(tmp_path)
    content = json.loads(annotations.read_text())
    for number, entry in enumerate(content["annotations"]):
        entry["image_id"] = (str, float)[number % 2](entry["image_id"])
    summary = import_coco(put_json(annotations, content), images, tmp_path / "out")
    assert (summary.rows, summary.references, summary.unlisted.captions) == (4, 12, 0)
    content["images"][3]["id"] = "101"
    with pytest.raises(DataError, match=r"image id 101 is that of two pictures"):
        import_coco(put_json(annotations, content), images, tmp_path / "two")
    for wrong in (None, True, 1.5):
        content["images"][3]["id"] = wrong
        with pytest.raises(DataError, match=rf"the image id {wrong} is neither a whole number nor text"):
            import_coco(put_json(annotations, content), images, tmp_path / "two")


def test_a_caption_that_is_no_text_is_named_and_those_of_unlisted_images_are_counted(tmp_path: Path) -> None:
    annotations, images = coco(tmp_path)
    content = json.loads(annotations.read_text())
    content["annotations"] += [{"id": 90 + i, "image_id": 500 + i // 2, "caption": "whose?"} for i in range(3)]
    summary = import_coco(put_json(annotations, content), images, tmp_path / "out")
    assert summary.rows == 4
    assert (summary.unlisted.captions, summary.unlisted.image_ids) == (3, ("500", "501"))
    content["annotations"][5]["caption"] = None
    with pytest.raises(DataError, match=r"captions_val.json, annotation 11 of image 101 has the caption None: it must"):
        import_coco(put_json(annotations, content), images, tmp_path / "null")
    file, flat = karpathy(tmp_path)
    content = json.loads(file.read_text())
    content["images"][1]["sentences"][1]["raw"] = 3
    with pytest.raises(DataError, match=r"dataset_coco.json, image 2 \(2.jpg\): a sentence has the caption 3"):
        import_coco(None, flat, tmp_path / "null", karpathy=put_json(file, content))


def test_coco_files_that_are_something_else(tmp_path: Path) -> None:
    annotations, images = coco(tmp_path)
    out = tmp_path / "out"
    broken = tmp_path / "broken.json"
    broken.write_text('{"images": [')
    with pytest.raises(DataError, match=r"broken.json is no JSON: .*line 1 column 13"):
        import_coco(broken, images, out)
    with pytest.raises(DataError, match=r"other.json is no COCO captions file .*: 'annotations' is missing"):
        import_coco(put_json(tmp_path / "other.json", {"images": []}), images, out)
    with pytest.raises(DataError, match=r"is no COCO captions file"):
        import_coco(put_json(tmp_path / "list.json", [1]), images, out)
    with pytest.raises(DataError, match=r"lists no images"):
        import_coco(put_json(tmp_path / "none.json", {"images": [], "annotations": []}), images, out)
    with pytest.raises(DataError, match=r"cannot read .*nowhere.json: No such file"):
        import_coco(tmp_path / "nowhere.json", images, out)
    with pytest.raises(DataError, match=r"no image folder .*nowhere"):
        import_coco(annotations, tmp_path / "nowhere", out)
    with pytest.raises(DataError, match=r"not in the layout of dataset_coco\.json"):
        import_coco(None, images, out, karpathy=annotations)
    with pytest.raises(DataError, match="no split 'dev': choose of train, restval, val, test"):
        import_coco(None, images, out, karpathy=annotations, split="dev")
    with pytest.raises(DataError, match="split 'val' needs Karpathy"):
        import_coco(annotations, images, out, split="val")
    with pytest.raises(DataError, match="either a captions file or"):
        import_coco(annotations, images, out, karpathy=annotations)
    assert not out.exists()


# -- JSONL -------------------------------------------------------------------------------------------------------------


def test_jsonl_with_all_its_keys(tmp_path: Path) -> None:
    put_images(tmp_path, ["a.png", "sub/b.png"])
    file = put_lines(
        tmp_path / "mine.jsonl",
        {"image": "a.png", "captions": ["one", "two "], "id": 7, "prompt": "Q?", "metadata": {"k": [1]}},
        "",
        {"image": str(tmp_path / "sub" / "b.png"), "caption": "three"},
    )
    summary = import_jsonl(file, tmp_path / "out")
    assert (summary.rows, summary.references, summary.quarantined) == (2, 3, ())
    assert read(tmp_path / "out") == [
        Sample("7", (picture(0),), "Q?", ("one", "two"), {"k": [1]}),
        Sample("mine-0000003", (picture(1),), "P", ("three",), {}),
    ]


def test_jsonl_with_several_images(tmp_path: Path) -> None:
    put_images(tmp_path / "img", ["a.png", "b.png"])
    file = put_lines(tmp_path / "m.jsonl", {"images": ["a.png"]}, {"images": ["a.png", "b.png"], "text": "both"})
    import_jsonl(file, tmp_path / "out", images=tmp_path / "img")
    assert [len(each.images) for each in read(tmp_path / "out")] == [1, 2]


def test_jsonl_by_path_copies_each_image_once(tmp_path: Path) -> None:
    put_images(tmp_path, ["a.png"])
    (tmp_path / "same.png").write_bytes(picture(0))
    file = put_lines(tmp_path / "m.jsonl", {"image": "a.png"}, {"image": "same.png"})
    import_jsonl(file, tmp_path / "out", embed=False)
    assert [each.images for each in read(tmp_path / "out")] == [(picture(0),)] * 2
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1
    assert ParquetDataset(tmp_path / "out").groups[0].nbytes < 2000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png"', "is no JSON"),
        ('{"image": "a.png", "caption": "\xff"}', "is no JSON"),
        ("[1]", "is list, not an object"),
        ({"image": "a.png", "captoin": "x"}, "unknown key 'captoin'"),
        ({"caption": "x"}, "either `image`"),
        ({"image": "a.png", "images": ["a.png"]}, "either `image`"),
        ({"image": 3}, "3 should be text"),
        ({"image": "a.png", "captions": [4]}, "4 should be text"),
        ({"image": "a.png", "captions": ["x"], "text": "y"}, "under both 'captions' and 'text'"),
        ({"image": "a.png", "metadata": [1]}, "metadata is list"),
        ({"image": "a.png", "caption": "\ud800"}, "surrogates not allowed"),
        ({"image": "a.png", "id": "m-0000001"}, "id 'm-0000001' is that of line 1"),
        ({"images": ["a.png"]}, "same key, `image` or `images`"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, line: Any, message: str) -> None:
    put_images(tmp_path, ["a.png"])
    file = put_lines(tmp_path / "m.jsonl", {"image": "a.png"})
    with file.open("ab") as stream:
        stream.write((line if isinstance(line, str) else json.dumps(line)).encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=f"m.jsonl line 2.*{message}") as caught:
        import_jsonl(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "m.jsonl"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_jsonl_in_another_encoding_says_so(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"image": "0.png", "caption": "a"}\n', encoding=encoding)
    with pytest.raises(DataError, match=r"a.jsonl is not UTF-8 but UTF-16 or UTF-32: save it as UTF-8"):
        import_jsonl(file, tmp_path / "out")


def test_jsonl_images_outside_the_folder_are_left_out(tmp_path: Path) -> None:
    put_images(tmp_path, ["secret.png", "data/a.png"])
    names = ["../secret.png", str(tmp_path / "secret.png"), "x" * 5000, "nul\0.png", "none.png"]
    file = put_lines(tmp_path / "data" / "m.jsonl", {"image": "a.png"}, *({"image": name} for name in names))
    summary = import_jsonl(file, tmp_path / "out")
    assert summary.rows == 1
    refused, absolute, long, nul, missing = (record.reason for record in summary.quarantined)
    assert "lies outside" in refused
    assert "lies outside" in absolute
    assert "no usable path" in long or "cannot be read" in long
    assert "lies outside" in nul
    assert missing == f"image {tmp_path / 'data' / 'none.png'} is missing"


def test_jsonl_without_anything_to_import(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no lines"):
        import_jsonl(put_lines(tmp_path / "m.jsonl", " "), tmp_path / "out")
    with pytest.raises(DataError, match=r"nothing to import, no sample is whole: image .*a.png is missing"):
        import_jsonl(put_lines(tmp_path / "m.jsonl", {"image": "a.png"}), tmp_path / "out")
    with pytest.raises(DataError, match=r"cannot read .*none.jsonl: No such file"):
        import_jsonl(tmp_path / "none.jsonl", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.jsonl"]
