"""The pictures of a report with their captions: best gains, middle, worst losses, and where the reward is in doubt."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mmrl_ray.data.images import decode_image
from mmrl_ray.errors import ImageError
from mmrl_ray.metrics.text import pieces, words
from mmrl_ray.run_dir import RunDir
from mmrl_ray.runs.eval_records import IMAGES, SHOWN, doubtful, find_image, highlights
from mmrl_ray.runs.scores import CaptionScore, Evaluation, paired

_TITLES = {
    "best": "Where the reward rose most",
    "middle": "In the middle",
    "worst": "Where the reward rose least or fell",
    "sigma": "Where the reward is least sure: the largest σ",
    "disagreement": "Where the parts of the reward disagree most",
}
_THUMBNAIL = 320
"""Pixels of the longer side at most."""
_COARSE = 128
"""Below it a picture is enlarged with its pixels showing."""


def caption_groups(run: RunDir, before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """Titled groups of cards: what changed, or of one evaluation alone its first captions; then what is in doubt."""
    names = run.list(IMAGES)
    newest = after or before
    if newest is None:
        return []
    earlier: dict[int, CaptionScore] = {}
    if before is not None and after is not None:
        # By the caption itself, not its sample's id, which others may share.
        earlier = {id(new): old for old, new in paired(before.captions, after.captions)}

    def group(title: str, captions: Sequence[CaptionScore]) -> dict[str, Any]:
        pairs = [(earlier.get(id(c)), c) if after is not None else (c, None) for c in captions]
        return {"title": title, "cards": [_card(run, names, old, new) for old, new in pairs]}

    if before is not None and after is not None:
        chosen = highlights(before.captions, after.captions)
        groups = [group(_TITLES[key], [second for _, second in pairs]) for key, pairs in chosen.items()]
    else:
        groups = [group(f"The first captions, {'after' if after else 'before'} training", newest.captions[:SHOWN])]
    groups += [group(_TITLES[key], captions) for key, captions in doubtful(newest.captions).items()]
    return [each for each in groups if each["cards"]]


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
    if before is not None and after is not None and before.reward is not None and after.reward is not None:
        gain = after.reward.total - before.reward.total
        card["gain"] = f"{gain:+.3f}"
        card["gain_kind"] = "good" if gain > 0 else "bad" if gain < 0 else "flat"
    return card


def _side(kind: str, title: str, score: CaptionScore) -> dict[str, Any]:
    known = {word for reference in score.references for word in words(reference)}
    parts = [{"name": name, "value": f"{value:.2f}"} for name, value in _shown_parts(score)]
    reward = score.reward
    return {
        "kind": kind,
        "title": title,
        "reward": "no reward"
        if reward is None
        else f"{reward.total:.3f}" + ("" if reward.sigma is None else f" ± {reward.sigma:.3f}"),
        "pieces": list(_pieces(score.caption, known)),
        "parts": parts,
    }


def _shown_parts(score: CaptionScore) -> list[tuple[str, float]]:
    """Reward parts by their innermost name, and CIDEr-D; a lone part that equals the total would say nothing new."""
    if score.reward is None:
        return [("CIDEr-D", score.scores.get("cider_d", 0.0))]
    parts = dict(score.reward.parts)
    if len(score.reward.weights) == 1:
        (only,) = score.reward.weights
        if any(name.startswith(f"{only}/") for name in parts):
            parts = {name.removeprefix(f"{only}/"): value for name, value in parts.items() if name != only}
    parts.setdefault("CIDEr-D", score.scores.get("cider_d", 0.0))
    return list(parts.items())


def _pieces(caption: str, known: set[str]) -> list[dict[str, str]]:
    """The caption in words and what stands between; a word is a `hit` if some reference has it."""
    shown = []
    for text in pieces(caption):
        own = words(text)
        shown.append({"text": text, "kind": "" if not own else "hit" if known.issuperset(own) else "miss"})
    return shown


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
