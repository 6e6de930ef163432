"""The learned reward model as a reward: what its mean says of picture and caption, with its σ beside it.

Imports torch only in the process that scores: a config with a learned part is read and sent about without.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import DataError, ModelError, RewardError
from mmrl_ray.rewards.base import RewardBreakdown, check_pairs

if TYPE_CHECKING:
    from mmrl_ray.reward_model.model import RewardModel
    from mmrl_ray.reward_model.vision_source import VisionSource

_CACHE_BYTES = 256 << 20
"""For pictures, or vision features, that come again."""


class LearnedReward:
    """A folder of `mmrl reward train` as a `RewardFn`. Pickles as its path; the weights load where it first scores."""

    def __init__(self, path: str | Path, device: str | None = None) -> None:
        """It scores on `device`; by default on the first GPU of the process that scores, or else its CPU.

        Raises:
            ModelError: there is no reward model at `path`.
        """
        self.path = str(Path(path).expanduser().absolute())
        self.device = device
        self.has_sigma = _sigma_trained(Path(self.path))
        """Whether σ was trained: only then it says anything, and only then breakdowns have one."""
        self._loaded: tuple[RewardModel, VisionSource] | None = None
        self._lock = threading.Lock()

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown a caption: `total` and the part `mean` are the mean, `sigma` its σ. See `RewardFn`.

        Raises:
            RewardError: a picture is absent or broken, or a score is no finite number.
            ModelError: the folder cannot be loaded.
        """
        check_pairs(samples, captions)
        if not captions:
            return []
        for sample in samples:
            if not sample.images:
                raise RewardError(f"the learned reward needs the picture of sample {sample.id!r}, which came without")
        with self._lock:  # an attempt that ran past its deadline may still be at it
            model, source = self._load()
            try:
                scores = model.score(source, [tuple(sample.images) for sample in samples], captions)
            except DataError as error:
                raise RewardError(f"the learned reward {self.path}: {error}") from error
        rows = zip(samples, scores.mean.tolist(), scores.sigma.tolist(), strict=True)
        return [self._breakdown(*row) for row in rows]

    def _breakdown(self, sample: Sample, mean: float, sigma: float) -> RewardBreakdown:
        if not (math.isfinite(mean) and math.isfinite(sigma)):
            raise RewardError(f"the learned reward {self.path} gives {mean} ± {sigma} on sample {sample.id!r}")
        return RewardBreakdown(mean, {"mean": mean}, {"mean": 1.0}, sigma if self.has_sigma else None)

    def _load(self) -> tuple[RewardModel, VisionSource]:
        if self._loaded is None:
            from mmrl_ray.reward_model.model import load_reward_model
            from mmrl_ray.reward_model.vision_source import source_of

            model = load_reward_model(self.path)
            source = source_of(model.spec, _CACHE_BYTES, self.device)
            self._loaded = model if self.device is None else model.to(self.device), source
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "has_sigma": self.has_sigma, "device": self.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.has_sigma, self.device = state["path"], state["has_sigma"], state["device"]
        self._loaded, self._lock = None, threading.Lock()


def _sigma_trained(folder: Path) -> bool:
    """Read with nothing but JSON: `reward_model/model.py` reads the whole, strictly, where the weights load."""
    file = folder / "reward_model.json"
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["sigma_trained"])
    except FileNotFoundError:
        raise ModelError(
            f"no reward model at {folder}: it has no {file.name}; train one with `mmrl reward train`, or mend the path"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
