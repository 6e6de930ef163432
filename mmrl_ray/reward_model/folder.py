"""A learned reward as a folder: `reward_model.json` (what it is), `model.safetensors` (weights), `report.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmrl_ray.data import atomic
from mmrl_ray.errors import ModelError
from mmrl_ray.reward_model.model import RewardModel
from mmrl_ray.reward_model.vision_source import RewardModelSpec

SPEC, WEIGHTS, REPORT = "reward_model.json", "model.safetensors", "report.json"
_FORMAT = RewardModelSpec.model_fields["format"].default


def save_reward_model(model: RewardModel, folder: str | Path, report: Mapping[str, Any]) -> None:
    """Writes a reward's folder, whole or not at all.

    Raises:
        ModelError: something is there already, or it cannot be written.
    """
    target = Path(folder).expanduser().absolute()
    refuse_occupied(target)
    try:
        with atomic.scratch_folder(target.parent) as scratch:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
            save_file(weights, scratch / WEIGHTS)
            _write_json(scratch / SPEC, model.spec.model_dump(mode="json"))
            _write_json(scratch / REPORT, report)
            atomic.commit_folder(scratch, target)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the reward model cannot be written to {target}: {_brief(error)}") from error


def load_reward_model(folder: str | Path) -> RewardModel:
    """A reward from its folder, in eval mode and on the CPU.

    Raises:
        ModelError: no such folder, a file that is missing or broken, another format, or weights that do not fit.
    """
    spec = read_spec(folder)
    file = Path(folder).expanduser() / WEIGHTS
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {_brief(error)}; train or copy it again") from error
    with torch.random.fork_rng(devices=[]):
        model = RewardModel(spec)
    wanted = model.state_dict()
    if stored.keys() != wanted.keys():
        missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
        problem = f"lacks {missing[0]!r}" if missing else f"has the unknown weight {unknown[0]!r}"
        raise ModelError(f"{file} {problem}: it does not belong to the {SPEC} beside it")
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise ModelError(
                f"{file}: {name} is {list(tensor.shape)} {tensor.dtype}, but {SPEC} asks for "
                f"{list(wanted[name].shape)} {wanted[name].dtype}"
            )
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{file}: {name} holds NaN or infinity; train it again")
    model.load_state_dict(stored)
    return model.eval().requires_grad_(False)


def read_spec(folder: str | Path) -> RewardModelSpec:
    """What a reward's folder says of itself, without its weights.

    Raises:
        ModelError: as `load_reward_model`.
    """
    folder = Path(folder).expanduser()
    file = folder / SPEC
    if not folder.is_dir():
        raise ModelError(f"no reward model at {folder}: train one with `mmrl reward train`, or mend the path")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is no reward model: it has no {SPEC}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {_brief(error)}") from error
    version = found.get("format") if isinstance(found, dict) else None
    if version != _FORMAT:
        raise ModelError(
            f"{file} is of format {version!r}, this program knows format {_FORMAT}: train the reward again with it"
        )
    try:
        return RewardModelSpec.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"{file}: {key or 'it'}: {' '.join(first['msg'].split())}") from error


def refuse_occupied(target: str | Path) -> None:
    """Raises ModelError if anything is where a reward's folder is to be."""
    if Path(target).expanduser().exists():
        raise ModelError(f"{target} exists already: remove it, or name another `out`")


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
