"""Captions and measures as pandas frames, whose pictures notebooks show."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

import pandas as pd
from PIL import Image

from mmrl_ray.data.images import decode_image, encode_png
from mmrl_ray.errors import DataError, ImageError
from mmrl_ray.evaluation.scores import CaptionScore, Evaluation

_SIDE = 96
"""Pixels of a picture in a table."""
_ROWS = 20
"""That a notebook shows of a table with pictures; the others are there."""
_LONG = 300


class Picture:
    """A stored picture by its hash: read when it is looked at, and drawn by notebooks."""

    __slots__ = ("_read", "digest")

    def __init__(self, digest: str, read: Callable[[str], bytes | None]) -> None:
        """`read` gives the encoded picture of a hash; None where it is not kept."""
        self.digest = digest
        self._read = read

    @property
    def data(self) -> bytes:
        """The encoded picture, as the data set has it.

        Raises:
            DataError: it is not kept.
        """
        if (data := self._read(self.digest)) is None:
            raise DataError(f"picture {self.digest} is not kept here: the data set has it")
        return data

    @property
    def image(self) -> Image.Image:
        """RGB, upright; raises as `data`, and an ImageError where it is broken."""
        return decode_image(self.data)

    def thumbnail(self, side: int = _SIDE) -> str:
        """An `<img>` of at most `side` pixels a side; empty where there is no picture to be had."""
        try:
            image = self.image
        except (DataError, ImageError):
            return ""
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        data = base64.b64encode(encode_png(image)).decode()
        return f'<img alt="{self.digest[:12]}" src="data:image/png;base64,{data}">'

    def _repr_png_(self) -> bytes | None:
        try:
            return encode_png(self.image)
        except (DataError, ImageError):
            return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __lt__(self, other: Picture) -> bool:
        return self.digest < other.digest

    def __repr__(self) -> str:
        return f"Picture({self.digest[:12]})"


class Captions(pd.DataFrame):
    """A frame of captions, a row each; notebooks show its first rows with their pictures. So are selections."""

    @property
    def _constructor(self) -> Callable[..., pd.DataFrame]:
        return Captions

    def _repr_html_(self) -> str:
        shown = pd.DataFrame(self.head(_ROWS)).dropna(axis=1, how="all")
        drawn: dict[str, Callable[[Any], str]] = dict.fromkeys(map(str, shown.columns), _cell)
        with pd.option_context("display.max_colwidth", None):  # cells are cut by `_cell`, and an `<img>` never
            table = shown.to_html(escape=False, formatters=drawn) if len(shown.columns) else ""
        left = len(self) - len(shown)
        return f"{table}<p>{len(self):,} rows{f', {left:,} of them not shown' if left else ''}</p>"


def _cell(value: Any) -> str:
    if isinstance(value, Picture):
        return value.thumbnail()
    if isinstance(value, list | tuple):
        return "<br>".join(_cell(each) for each in value)
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape(text if len(text) <= _LONG else f"{text[:_LONG]}…")


def measures_frame(evaluation: Evaluation) -> pd.DataFrame:
    """A row a measure: `value`, and `low` and `high` of its 95 % interval (NaN of a single sample)."""
    rows = {
        name: (each.mean, *((each.low, each.high) if each.known else (float("nan"), float("nan"))))
        for name, each in evaluation.measures.items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"])
    return frame.rename_axis("measure")


def evaluation_captions(evaluation: Evaluation, picture: Callable[[str], Picture]) -> Captions:
    """A row a caption: sample, picture, caption, references, `reward`, `reward/PART` each, scores."""
    return Captions([_row(score, picture) for score in evaluation.captions])


def _row(score: CaptionScore, picture: Callable[[str], Picture]) -> dict[str, Any]:
    reward = score.reward
    return {
        "sample": score.sample_id,
        "picture": first_picture(score.image_hashes, picture),
        "caption": score.caption,
        "references": list(score.references),
        "reward": float("nan") if reward is None else reward.total,
        **(part_columns(reward.parts) if reward is not None else {}),
        **score.scores,
        "prompt": score.prompt,
        "no_reward": score.no_reward or None,
    }


def first_picture(hashes: Iterable[str], picture: Callable[[str], Picture]) -> Picture | None:
    """The first of a sample's."""
    return next(map(picture, hashes), None)


def part_columns(parts: Mapping[str, float]) -> dict[str, float]:
    """`reward/PART` each."""
    return {f"reward/{name}": value for name, value in parts.items()}


def html_notes(notes: Iterable[str]) -> str:
    """A list of lines, as they are written; empty without any."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<ul>{items}</ul>" if items else ""
