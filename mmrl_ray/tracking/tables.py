"""Captions as tables with pictures, out of the run folder: of an evaluation, and of samples while a run learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mmrl_ray.data.images import decode_image, encode_png
from mmrl_ray.errors import MMRLError
from mmrl_ray.evaluation.records import IMAGES, find_image, load_evaluation
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.tracking.base import SIDE, Cell, Picture, Table

_SAMPLES = ("picture", "kind", "sample", "best", "best reward", "worst", "worst reward", "references")


def evaluation_table(run: RunDir, name: str, most: int) -> Table | None:
    """Of `eval/NAME.parquet` up to so many captions, those whose picture is kept first; None where it is not there.

    Raises:
        RunError: the record cannot be read.
    """
    evaluation = load_evaluation(run, name)
    if evaluation is None:
        return None
    names = run.list(IMAGES)
    stored = {each.split(".", 1)[0] for each in names}
    chosen = sorted(evaluation.captions, key=lambda each: not stored.issuperset(each.image_hashes))[:most]
    parts = list(dict.fromkeys(part for each in chosen if each.reward is not None for part in each.reward.parts))
    scores = list(dict.fromkeys(score for each in chosen for score in each.scores))
    rows = []
    for each in chosen:
        reward = each.reward
        images = [find_image(run, digest, names) for digest in each.image_hashes]
        row: list[Cell] = [_picture([image for image in images if image is not None], each.caption)]
        row += [each.sample_id, each.caption, None if reward is None else reward.total]
        row += [None if reward is None else reward.parts.get(part) for part in parts]
        row += [each.scores.get(score) for score in scores]
        rows.append([*row, " | ".join(each.references)])
    columns = ("picture", "sample", "caption", "reward", *(f"reward/{part}" for part in parts), *scores, "references")
    return Table(columns, rows)


def samples_table(run: RunDir, found: Mapping[str, Any]) -> Table:
    """Of one `samples/step-N.json`."""
    rows: list[list[Cell]] = []
    for each in found["pictures"]:
        best, worst = each["best"], each["worst"]
        images = [run.read_bytes(f"{IMAGES}/{name}") for name in each["images"] if run.exists(f"{IMAGES}/{name}")]
        shown = f"{best['reward']:.3f} {best['caption']}"
        if best != worst:
            shown += f"\n{worst['reward']:.3f} {worst['caption']}"
        row: list[Cell] = [_picture(images, shown), each["kind"], each["sample"], best["caption"], best["reward"]]
        rows.append([*row, worst["caption"], worst["reward"], " | ".join(each["references"])])
    return Table(_SAMPLES, rows)


def _picture(images: Sequence[bytes], caption: str) -> Picture | None:
    """One picture, scaled down; several stand side by side. None where there is none, or none that can be read."""
    try:
        opened = [decode_image(image) for image in images]
    except MMRLError:
        return None
    if not opened:
        return None
    for image in opened:
        image.thumbnail((SIDE, SIDE))
    if len(opened) == 1:
        return Picture(encode_png(opened[0]), caption)
    strip = Image.new("RGB", (sum(image.width for image in opened), max(image.height for image in opened)))
    left = 0
    for image in opened:
        strip.paste(image, (left, 0))
        left += image.width
    strip.thumbnail((SIDE, SIDE))
    return Picture(encode_png(strip), caption)
