"""The state of one modality: what a reward part is given of a sample, no more (s^m of docs/equations.md 10)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmrl_ray.config.reward import Modality
from mmrl_ray.data.samples import Sample

_VIEWS: Mapping[Modality, Callable[[Sample], Sample]] = {
    "image": lambda s: Sample(s.id, s.images, "", ()),
    "text": lambda s: Sample(s.id, (), s.prompt, ()),
    "reference": lambda s: Sample(s.id, (), "", s.references),
    "sample": lambda s: s,
}
_VALUES: Mapping[Modality, Callable[[Sample], Any]] = {
    "image": lambda s: s.images,
    "text": lambda s: s.prompt,
    "reference": lambda s: s.references,
    "sample": lambda s: s,
}


def views(samples: Sequence[Sample], modality: Modality) -> list[Sample]:
    """Samples with their id and this modality alone; one that comes several times stays one object."""
    made: dict[int, Sample] = {}
    for sample in samples:
        if id(sample) not in made:
            made[id(sample)] = _VIEWS[modality](sample)
    return [made[id(sample)] for sample in samples]


def state_value(sample: Sample, modality: Modality) -> Any:
    """The state by itself: encoded image files, the prompt, a tuple of references, or the whole sample."""
    return _VALUES[modality](sample)
