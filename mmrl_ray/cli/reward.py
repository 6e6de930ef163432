"""Commands around a learned reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmrl_ray.cli.groups import reward_app
from mmrl_ray.cli.guard import command
from mmrl_ray.cli.options import AsJson, ConfigFile, Overrides, show_json


@command(reward_app, "train")
def train(config: ConfigFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Train a reward model on preferences and ratings; print its figures on held-out data."""
    from mmrl_ray.config.load import load_reward_model_config

    cfg = load_reward_model_config(config, set_ or ())
    from mmrl_ray.runs.interrupts import StopOnInterrupt
    from mmrl_ray.runs.progress import RunProgress
    from mmrl_ray.runs.reward_model import print_report, train_reward

    with StopOnInterrupt(), RunProgress() as shown:
        report = train_reward(cfg, progress=shown.phase("reward model", lazily=True), busy=shown.busy)
    if as_json:
        show_json(report)
        return
    print_report(report)
    typer.echo(cfg.out)


@command(reward_app, "evaluate")
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a reward model.")],
    data: Annotated[str, typer.Option("--data", help="Parquet of preferences or ratings.")],
    out: Annotated[Path | None, typer.Option("--out", help="Also write the figures here, as JSON.")] = None,
    scale: Annotated[tuple[float, float], typer.Option("--scale", help="Least and greatest rating.")] = (0.0, 1.0),
    as_json: AsJson = False,
) -> None:
    """Pairwise accuracy, likelihood and calibration of a reward model on other data."""
    from mmrl_ray.config.reward_model import RewardDataSection
    from mmrl_ray.runs.interrupts import StopOnInterrupt
    from mmrl_ray.runs.progress import RunProgress
    from mmrl_ray.runs.reward_model import evaluate_reward, print_report

    with StopOnInterrupt(), RunProgress() as shown, shown.busy("scoring"):
        report = evaluate_reward(model, RewardDataSection(train=data, rating_scale=scale))
    show_json(report) if as_json else print_report(report)
    if out is not None:
        from mmrl_ray import atomic

        atomic.write_file(out, (json.dumps(report, indent=2) + "\n").encode())
