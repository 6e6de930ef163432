"""Whether a policy's captions depend on the picture: held against how much those of its references do.

Of N different pictures, each text counted without case and spacing: the share of pictures that got the most frequent
caption; the largest share for which some single text is among the references; and the effective numbers e^H of
captions and of references (H the entropy in nats; of a picture's references the one that most pictures share), which
say how many equally frequent texts would differ as much. A policy counts as blind on at least `MIN_PICTURES` pictures
where

    one caption goes to 90 % of them or more, and no single text would be right for 70 %, or
    captions differ less than two equally frequent ones would, and references as much as ten do or more.

So a policy that says little but says it of the picture is none, nor one on data whose pictures are all alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmrl_ray.evaluation.scores import Evaluation

EVENT = "captions_blind"
MIN_PICTURES = 20
_SAME = 0.9
_ALIKE = 0.7
_FEW, _MANY = 2.0, 10.0
_SHOWN = 80
_REMEDY = (
    "The policy does not see what it describes, and rewards would teach it words alone: see that the data pairs "
    "pictures with their own captions, train the warm start longer, with its vision tower "
    "(sft.train_vision: true) or a lower sft.lr, or start from a model that captions such pictures"
)


@dataclass(frozen=True, slots=True)
class Blindness:
    """Captions that do not depend on the picture."""

    pictures: int
    share: float
    """Of the pictures, with the most frequent caption."""
    caption: str
    """That caption."""
    effective: float
    """Number of equally frequent captions that would differ as much."""
    effective_references: float

    def told(self, what: str) -> str:
        """For people; `what` names whose captions they are, "evaluation before training" say."""
        caption = self.caption if len(self.caption) <= _SHOWN else f"{self.caption[: _SHOWN - 1]}…"
        return (
            f"captions do not depend on the picture ({what}): {self.share:.0%} of {self.pictures} different pictures "
            f"got {caption!r}; captions differ as {self.effective:.1f} equally frequent ones do, references as "
            f"{self.effective_references:.1f}. {_REMEDY}"
        )

    def to_json(self) -> dict[str, Any]:
        """For an event."""
        return {
            "pictures": self.pictures,
            "share": round(self.share, 4),
            "caption": self.caption,
            "effective_captions": round(self.effective, 2),
            "effective_references": round(self.effective_references, 2),
        }


def blindness(rows: Iterable[tuple[Sequence[str], Sequence[str], str]]) -> Blindness | None:
    """Of (image hashes, references, greedy caption) a sample; None where captions depend on pictures, or who knows."""
    by_picture = {tuple(images): (references, caption) for images, references, caption in rows}
    pictures = len(by_picture)
    if pictures < MIN_PICTURES:
        return None
    said = Counter(_plain(caption) for _, caption in by_picture.values())
    right = Counter(text for references, _ in by_picture.values() for text in {_plain(r) for r in references})
    likeliest = Counter(
        max({_plain(r) for r in references}, key=lambda text: (right[text], text))
        for references, _ in by_picture.values()
        if references
    )
    (most, count), alike = said.most_common(1)[0], max(right.values(), default=0) / pictures
    effective, effective_references = _effective(said), _effective(likeliest)
    same = count / pictures >= _SAME and alike <= _ALIKE
    if not likeliest or not (same or (effective < _FEW and effective_references >= _MANY)):
        return None
    shown = next(caption for _, caption in by_picture.values() if _plain(caption) == most)
    return Blindness(pictures, count / pictures, " ".join(shown.split()), effective, effective_references)


def evaluation_blindness(evaluation: Evaluation) -> Blindness | None:
    """`blindness` of an evaluation's captions."""
    return blindness((c.image_hashes, c.references, c.caption) for c in evaluation.captions)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _effective(counts: Counter[str]) -> float:
    total = sum(counts.values())
    return math.exp(-sum(n / total * math.log(n / total) for n in counts.values())) if total else 0.0
