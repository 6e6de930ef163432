"""Every shipped config parses, reads back as dumped, and dry-runs as far as it goes without weights."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from mmrl_ray.config.load import (
    dump_config,
    load_as,
    load_config,
    parse_as,
    parse_config,
)
from mmrl_ray.config.reward_model import RewardModelConfig
from mmrl_ray.config.serving import ServeConfig
from mmrl_ray.planning.dry_run import dry_run

ROOT = Path(__file__).parents[3]
SERVE = ROOT / "configs" / "serve.yaml"
REWARD_MODEL = ROOT / "configs" / "reward-model.yaml"
SHIPPED = sorted(set((ROOT / "configs").glob("*.yaml")) - {SERVE, REWARD_MODEL})


def test_the_promised_ones_are_there() -> None:
    assert {p.name for p in SHIPPED} >= {
        *("quickstart.yaml", "smolvlm-256m-coco.yaml", "smolvlm-256m-qlora.yaml", "qwen2.5-vl-3b-coco.yaml")
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_parses_and_dry_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # neither the checkout's data nor its runs
    cfg = load_config(path)
    assert parse_config(dump_config(cfg), "again.yaml") == cfg
    assert cfg.run.name == path.stem
    if cfg.reward.code is not None:  # a folder of the checkout
        cfg = load_config(path, [f"reward.code={ROOT / cfg.reward.code}"])
    text = io.StringIO()
    found = dry_run(cfg, console=Console(file=text, width=200))
    assert f"the run     {cfg.learner.steps:,} steps" in text.getvalue()
    missing_data = [line for line in found.blocking if line.startswith("data.")]
    lacking = ("GPU asked for", "pip install 'mmrl_ray[bitsandbytes]'")  # where tests run
    other = [line for line in found.blocking if line not in missing_data and not any(each in line for each in lacking)]
    assert other == []
    assert bool(missing_data) == (cfg.data.scenes is None)
    assert (found.shape is not None) == cfg.model.path.startswith("builtin:")
    assert list(tmp_path.iterdir()) == []


def test_the_serve_config_parses() -> None:
    cfg = load_as(ServeConfig, SERVE)
    assert parse_as(ServeConfig, dump_config(cfg), "again.yaml") == cfg


def test_the_config_of_a_reward_model_parses() -> None:
    cfg = load_as(RewardModelConfig, REWARD_MODEL)
    assert parse_as(RewardModelConfig, dump_config(cfg), "again.yaml") == cfg
