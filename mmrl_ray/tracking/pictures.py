"""Looks at pictures while a run learns: every `tracking.samples_every` steps the best and worst captions of some.

A thread of its own: fresh pictures are read from the rollout log, fixed ones are captioned by the rollout workers with
the newest version. What goes wrong there is a line in the log, and ends no run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample, read_split
from mmrl_ray.errors import MMRLError
from mmrl_ray.experience.carriers import RewardBreakdown, SamplingParams, derive_seed
from mmrl_ray.rollouts.controller_actor import IDLE_TIMEOUT_S, ControllerClient
from mmrl_ray.rollouts.types import Wait
from mmrl_ray.run_records.rollout_log import FOLDER, rollouts_name
from mmrl_ray.run_records.run_dir import RunDir, steps_in
from mmrl_ray.run_records.samples import (
    best_and_worst,
    sample_steps,
    save_samples,
    store_pictures,
    stored_pictures,
)

logger = logging.getLogger(__name__)

_LOCAL_S = 1.0
_REMOTE_S = 10.0
_CAPTIONS = 4
"""Of a fixed picture, if groups have as many."""
_JOIN_S = 10.0
_COLUMNS = ("index", "completion", "sample_id", "image_hash", "caption", "reward", "reward_parts", "policy_version")


class PictureTaker:
    """For as long as it is entered."""

    def __init__(
        self, cfg: Config, run: RunDir, held_out: Sequence[Sample], controller: ControllerClient | None
    ) -> None:
        """`held_out` are the samples whose first are the fixed ones; without a controller only fresh ones are shown."""
        self._cfg, self._run, self._controller = cfg, run, controller
        self._every = cfg.tracking.samples_every
        self._fixed: list[Sample] | None = list(held_out[: cfg.tracking.fixed_pictures]) or None
        self._period_s = _LOCAL_S if run.is_local else _REMOTE_S
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="pictures", daemon=True)

    def __enter__(self) -> Self:
        if self._every is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)

    def _work(self) -> None:
        assert self._every is not None
        failing = False
        last = False
        while not last:
            last = self._closing.wait(self._period_s)  # and then a last look: a step was finished since the one before
            try:
                self._look(self._every, is_last=last)
                failing = False
            except Exception as error:  # the boundary of the thread
                if not failing and not last:
                    known = isinstance(error, MMRLError)
                    logger.warning("no pictures are shown: %s", error, exc_info=None if known else error)
                failing = True

    def _look(self, every: int, *, is_last: bool) -> None:
        """Takes the newest step that is due, if it is finished."""
        taken = sample_steps(self._run)
        due = (taken[-1] if taken else 0) + every
        due -= due % every
        if self._controller is None:  # an agent, whose rounds are of several steps
            step = max((place + 1 for place in steps_in(self._run, FOLDER, ".parquet")), default=0)
        else:
            # Not as the log has it: of steps that are done again there are still the old ones.
            step = int(self._controller.status()["step"])
            step -= step % every
        if step < due or not self._run.exists(rollouts_name(step - 1)):  # it is written in the background
            return
        fixed, version = ([], None) if is_last else self._captioned()
        rewards, fresh, logged = self._logged(step - 1)
        if fixed or fresh:
            version = logged if version is None else version
            found = {"policy_version": version, "rewards": rewards, "pictures": [*fixed, *fresh]}
            save_samples(self._run, step, found)

    # -- fresh ones ------------------------------------------------------------------------------------------------

    def _logged(self, step: int) -> tuple[dict[str, list[float]], list[dict[str, Any]], int | None]:
        """Rewards of a step's captions, pictures worth showing, and the version that wrote the captions."""
        content = pa.BufferReader(self._run.read_bytes(rollouts_name(step)))
        rows = [row for row in pq.read_table(content, columns=list(_COLUMNS)).to_pylist() if row["completion"] >= 0]
        rated = [row for row in rows if row["reward"] is not None]
        rewards: dict[str, list[float]] = {"reward": [row["reward"] for row in rated]}
        for row in rated:
            for part in row["reward_parts"]:
                rewards.setdefault(f"reward/{part['name']}", []).append(part["value"])
        groups: dict[int, list[dict[str, Any]]] = {}
        for row in rated:
            groups.setdefault(row["index"], []).append(row)
        chosen = _chosen(groups, self._cfg.tracking.fresh_pictures)
        pictures = []
        for group in (groups[index] for index in chosen):
            captions = [(row["caption"], row["reward"]) for row in group]
            images = stored_pictures(self._run, group[0]["image_hash"])
            pictures.append(_entry("fresh", group[0]["sample_id"], images, (), captions))
        return rewards, pictures, max((row["policy_version"] for row in rows), default=None)

    # -- fixed ones ------------------------------------------------------------------------------------------------

    def _captioned(self) -> tuple[list[dict[str, Any]], int | None]:
        """The fixed pictures with captions of the newest version, and that; none where nobody captions any more."""
        controller, tracking = self._controller, self._cfg.tracking
        if controller is None or not tracking.fixed_pictures:
            return [], None
        if self._fixed is None:
            prompt = self._cfg.data.prompt
            self._fixed = list(read_split(self._cfg.data.train, prompt=prompt, limit=tracking.fixed_pictures))
        rollout = self._cfg.rollout
        sampling = SamplingParams(
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            seed=derive_seed(self._cfg.run.seed, "pictures"),
        )
        completions = max(1, min(_CAPTIONS, rollout.group_size))
        number = controller.call("ask_captions", self._fixed, sampling, completions=completions)
        while isinstance(answer := controller.call("captions", number, 0.0, IDLE_TIMEOUT_S), Wait):
            if self._closing.wait(self._period_s):
                return [], None
        done = [(sample, group) for sample, group in zip(self._fixed, answer.groups, strict=True) if group is not None]
        texts = controller.groups([group.payload for _, group in done])
        found = []
        for (sample, scored), group in zip(done, texts, strict=True):
            rewards = [each.total if isinstance(each, RewardBreakdown) else None for each in scored.rewards]
            captions = list(zip((each.text for each in group.completions), rewards, strict=False))
            entry = _entry("fixed", sample.id, store_pictures(self._run, sample.images), sample.references, captions)
            if "best" in entry:
                found.append(entry)
        return found, answer.version


def _entry(
    kind: str,
    sample: str,
    images: Sequence[str],
    references: Sequence[str],
    captions: Sequence[tuple[str, float | None]],
) -> dict[str, Any]:
    known = {"kind": kind, "sample": sample, "images": list(images), "references": list(references)}
    return {**known, **best_and_worst(captions)}


def _chosen(groups: dict[int, list[dict[str, Any]]], count: int) -> list[int]:
    """Places of groups: the one of the best caption, the one of the worst, then the first."""
    if not groups or not count:
        return []
    best = max(groups, key=lambda index: max(row["reward"] for row in groups[index]))
    worst = min(groups, key=lambda index: min(row["reward"] for row in groups[index]))
    return list(dict.fromkeys([best, worst, *sorted(groups)]))[:count]
