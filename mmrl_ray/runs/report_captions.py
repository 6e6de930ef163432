"""The pictures of a report with their captions: best gains, middle, worst losses."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mmrl_ray.data.images import decode_image
from mmrl_ray.errors import ImageError
from mmrl_ray.metrics.text import words
from mmrl_ray.run_dir import RunDir
from mmrl_ray.runs.eval_records import IMAGES, SHOWN, find_image, highlights
from mmrl_ray.runs.scores import CaptionScore, Evaluation

_TITLES = {
    "best": "Where the reward rose most",
    "middle": "In the middle",
    "worst": "Where the reward rose least or fell",
}
_THUMBNAIL = 320
"""Pixels of the longer side at most."""
_COARSE = 128
"""Below it a picture is enlarged with its pixels showing."""
_PIECE = re.compile(r"\w+|\W+")


def caption_groups(run: RunDir, before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """Titled groups of cards; of one evaluation alone its first captions."""
    names = run.list(IMAGES)
    if before is not None and after is not None:
        chosen = highlights(before.captions, after.captions)
        return [
            {"title": _TITLES[key], "cards": [_card(run, names, first, second) for first, second in pairs]}
            for key, pairs in chosen.items()
            if pairs
        ]
    if before is not None:
        cards = [_card(run, names, caption, None) for caption in before.captions[:SHOWN]]
        return [{"title": "The first captions, before training", "cards": cards}]
    if after is not None:
        cards = [_card(run, names, None, caption) for caption in after.captions[:SHOWN]]
        return [{"title": "The first captions, after training", "cards": cards}]
    return []


def _card(run: RunDir, names: Sequence[str], before: CaptionScore | None, after: CaptionScore | None) -> dict[str, Any]:
    one = after or before
    assert one is not None
    sides = [("before", "Before", before), ("after", "After", after)]
    card: dict[str, Any] = {
        "sample_id": one.sample_id,
        "references": list(one.references),
        "sides": [_side(kind, title, score) for kind, title, score in sides if score is not None],
        "gain": "",
        "gain_kind": "flat",
        "alt": f"Picture of sample {one.sample_id}: {one.references[0] if one.references else one.caption}",
        **_picture(run, names, one),
    }
    if before is not None and after is not None:
        gain = after.reward.total - before.reward.total
        card["gain"] = f"{gain:+.3f}"
        card["gain_kind"] = "good" if gain > 0 else "bad" if gain < 0 else "flat"
    return card


def _side(kind: str, title: str, score: CaptionScore) -> dict[str, Any]:
    known = {word for reference in score.references for word in words(reference)}
    parts = [{"name": name, "value": f"{value:.2f}"} for name, value in _shown_parts(score)]
    return {
        "kind": kind,
        "title": title,
        "reward": f"{score.reward.total:.3f}",
        "pieces": list(_pieces(score.caption, known)),
        "parts": parts,
    }


def _shown_parts(score: CaptionScore) -> list[tuple[str, float]]:
    """Reward parts by their innermost name, and CIDEr-D; a lone part that equals the total would say nothing new."""
    parts = dict(score.reward.parts)
    if len(score.reward.weights) == 1:
        (only,) = score.reward.weights
        if any(name.startswith(f"{only}/") for name in parts):
            parts = {name.removeprefix(f"{only}/"): value for name, value in parts.items() if name != only}
    parts.setdefault("CIDEr-D", score.scores.get("cider_d", 0.0))
    return list(parts.items())


def _pieces(caption: str, known: set[str]) -> list[dict[str, str]]:
    """The caption in words and what stands between; a word is a `hit` if some reference has it."""
    pieces = []
    for text in _PIECE.findall(caption):
        kind = "" if not text[0].isalnum() and text[0] != "_" else "hit" if text.lower() in known else "miss"
        pieces.append({"text": text, "kind": kind})
    return pieces


def _picture(run: RunDir, names: Sequence[str], score: CaptionScore) -> dict[str, Any]:
    """The first picture as a data URI; empty when it is not stored or broken."""
    data = find_image(run, score.image_hashes[0], names) if score.image_hashes else None
    if data is None:
        return {"image": "", "width": 0, "height": 0, "pixelated": False}
    try:
        image = decode_image(data)
    except ImageError:
        return {"image": "", "width": 0, "height": 0, "pixelated": False}
    coarse = max(image.size) <= _COARSE
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "png" if coarse else "jpeg"
    image.save(buffer, format=kind, **({} if coarse else {"quality": 85}))
    return {
        "image": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "width": image.width,
        "height": image.height,
        "pixelated": coarse,
    }
