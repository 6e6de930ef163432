"""Pictures while a run learns: `samples/step-%06d.json`, of every so many steps the best and worst captions of some.

step                 finished steps
policy_version       of the captions of fixed pictures; those of fresh ones were learned from in the step before
rewards              each caption's of that step, by name: `reward`, `reward/PART`
pictures             `kind` (fixed or fresh), `sample`, `images` (names under `images/`), `references`, and of its
                     captions the `best` and the `worst`, each with `caption` and `reward`
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mmrl_ray.data.images import EXTENSIONS, image_extension, image_hash
from mmrl_ray.errors import RunError
from mmrl_ray.run_records.run_dir import RunDir, steps_in

FOLDER = "samples"


def samples_name(step: int) -> str:
    """The file of a step."""
    return f"{FOLDER}/step-{step:06d}.json"


def save_samples(run: RunDir, step: int, found: Mapping[str, Any]) -> None:
    """Writes what was taken after `step` finished steps."""
    run.write_json(samples_name(step), {"step": step, "time": time.time(), **found})


def sample_steps(run: RunDir) -> list[int]:
    """Steps that have samples, ascending."""
    return steps_in(run, FOLDER, ".json")


def load_samples(run: RunDir, step: int) -> dict[str, Any]:
    """Those of a step; a RunError where there are none."""
    found = run.read_json(samples_name(step))
    if not isinstance(found, dict) or not isinstance(found.get("pictures"), list):
        raise RunError(f"{run.full_path(samples_name(step))} holds no samples")
    return found


def newest_samples(run: RunDir) -> dict[str, Any] | None:
    """Those of the newest step; None before there are any."""
    with contextlib.suppress(RunError):  # one that is being written, or is another program's
        steps = sample_steps(run)
        return load_samples(run, steps[-1]) if steps else None
    return None


def best_and_worst(captions: Sequence[tuple[str, float | None]]) -> dict[str, Any]:
    """Of captions with their rewards; nothing where none has one."""
    rated = [(reward, text) for text, reward in captions if reward is not None]
    if not rated:
        return {}
    best, worst = max(rated, key=lambda each: each[0]), min(rated, key=lambda each: each[0])
    return {
        "best": {"caption": best[1], "reward": best[0]},
        "worst": {"caption": worst[1], "reward": worst[0]},
    }


def store_pictures(run: RunDir, images: Sequence[bytes]) -> list[str]:
    """Names under `images/` of a sample's pictures, which are put there unless they are."""
    names = [f"{image_hash([image])}.{image_extension(image)}" for image in images]
    for name, image in zip(names, images, strict=True):
        if not run.exists(f"images/{name}"):
            run.write_bytes(f"images/{name}", image)
    return names


def stored_pictures(run: RunDir, digest: str) -> list[str]:
    """The same of a sample by the hash that the rollout log has; empty where they are not there."""
    if run.exists(f"images/{digest}.json"):
        return [str(name) for name in run.read_json(f"images/{digest}.json")]
    names = (f"{digest}.{extension}" for extension in EXTENSIONS.values())
    return [name for name in names if run.exists(f"images/{name}")]
