"""Runs to export: a tiny model of a family as the base, a random adapter that is felt, held-out pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.config import Config
from mmrl_ray.config.load import dump_config
from mmrl_ray.data.samples import write_parquet
from mmrl_ray.learner.checkpoints import LearnerState, save_adapter_folder, save_checkpoint
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_parameters, add_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.run_records.run_dir import RunDir
from tests.support.tiny_models import build_family, make_samples, section_of


@dataclass(frozen=True)
class World:
    """A run and what it was made of."""

    root: Path
    run: RunDir
    cfg: Config
    policy: Policy
    """The base with the run's adapter."""

    @property
    def target(self) -> str:
        return self.run.location

    def export_to(self, name: str = "out") -> Path:
        return self.root / "exports" / name


MakeWorld = Callable[..., World]


def felt_adapter(policy: Policy, cfg: Config, scale: float = 0.3) -> None:
    """Puts an adapter on that changes what the policy says, by `scale`."""
    add_adapter(policy, cfg.model.lora, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(policy.model):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[MakeWorld]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def make(
        family: str = "llava", *, finished: bool = True, scale: float = 0.3, path: str | None = None, **model: Any
    ) -> World:
        base = path or str(tmp_path / "base")
        if path is None:
            build_family(family, base)
        held_out = tmp_path / "held out"
        write_parquet(held_out, make_samples())
        section = section_of(family, base, lora={"r": 4, "alpha": 8.0}, **model)
        cfg = Config.model_validate(
            {
                "run": {"name": "run", "root": str(tmp_path / "runs")},
                "model": section.model_dump(),
                "data": {"train": str(held_out), "eval": str(held_out), "prompt": "describe the image ."},
                "rollout": {"max_new_tokens": 8},
                "learner": {"steps": 5},
            }
        )
        run = RunDir.create(cfg.run.root, cfg.run.name)
        run.write_text("config.yaml", dump_config(cfg))
        policy = load_policy(cfg.model, device="cpu")
        felt_adapter(policy, cfg, scale)
        if finished:
            save_adapter_folder(run, "adapter", policy, 5)
        return World(tmp_path, run, cfg, policy)

    yield make
    torch.set_num_threads(threads)


def checkpoint(world: World, step: int) -> None:
    """Keeps the policy as a checkpoint of the run."""
    save_checkpoint(world.run, step, policy=world.policy, learner=LearnerState({}, {}), controller={}, keep=9)
