"""The learned reward with each of the four fusions: what it gets right, whether its σ holds, and what it costs.

    python benchmarks/reward_model.py

Trains `configs/reward-model.yaml` on generated preferences (`mmrl data preferences`, a noisy rater), once a fusion, and
looks at held-out pictures, all of which show a combination of colour, shape and place that training never did:

- accuracy on clean pairs (the same pairs judged without noise), over all and by fault;
- rank correlation (Spearman) of σ with the rater's noise, which is known;
- the share of noisy ratings in the central 50, 80 and 95 % intervals;
- seconds of training, wall and CPU.

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from mmrl_ray.config.load import load_as
from mmrl_ray.config.reward_model import RewardDataSection, RewardModelConfig
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.preferences.scene_preferences import label_noise, scene_preferences, write_scene_preferences
from mmrl_ray.reward_model.fusion import FUSIONS
from mmrl_ray.reward_model.model import load_reward_model
from mmrl_ray.reward_model.run import evaluate_reward, train_reward
from mmrl_ray.reward_model.vision_source import source_of

CONFIG = Path(__file__).parents[1] / "configs" / "reward-model.yaml"
SCENES = ScenesSection(train=2000, eval=200)


def noise_correlation(folder: Path) -> float:
    """Spearman's ρ of σ and the rater's noise, over the captions of the held-out pairs."""
    _, held_out = generate_scenes(SCENES)
    noise = {sample.id: label_noise(sample.metadata) for sample in held_out}
    pairs = [each.pair for each in scene_preferences(SCENES, "eval")]
    captions = [(p.image, text, noise[p.source.split("/")[1]]) for p in pairs for text in (p.caption_a, p.caption_b)]
    model = load_reward_model(folder)
    source = source_of(model.spec, 1 << 28)
    scores = model.score(source, [(image,) for image, _, _ in captions if image], [text for _, text, _ in captions])
    return float(spearmanr(scores.sigma.numpy(), [level for _, _, level in captions]).statistic)


def measure(fusion: str, folder: Path) -> dict[str, Any]:
    """Trains and looks."""
    data = folder / "data"
    out = folder / fusion
    overrides = [
        f"net.fusion={fusion}",
        f"out={out}",
        f"data.train={data}/train.parquet",
        f"data.eval={data}/eval.parquet",
    ]
    cfg = load_as(RewardModelConfig, CONFIG, overrides)
    began = time.process_time()
    report = train_reward(cfg)
    cpu = time.process_time() - began
    clean = evaluate_reward(out, RewardDataSection(train=f"{data}/clean.parquet"))["held_out"]["pairs"]
    found = report["held_out"]
    return {
        "clean_accuracy": clean["accuracy"],
        "by_fault": {part.removeprefix("scenes:"): row["accuracy"] for part, row in clean["parts"].items()},
        "noisy_accuracy": found["pairs"]["accuracy"],
        "expected_accuracy": found["pairs"]["expected"],
        "pair_nll": found["pairs"]["nll"],
        "coverage": found["ratings"]["coverage"],
        "sigma_noise_rank_correlation": noise_correlation(out),
        "seconds": report["seconds"]["training"],
        "cpu_seconds": cpu,
        "steps": report["training"]["steps"],
    }


def main() -> None:
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="mmrl-bench-") as name:
        write_scene_preferences(SCENES, Path(name) / "data")
        for fusion in FUSIONS:
            found[fusion] = measure(fusion, Path(name))
    faults = list(found[FUSIONS[0]]["by_fault"])
    table = Table(title=f"learned reward, {SCENES.eval} held-out pictures, {torch.get_num_threads()} threads")
    columns = ("fusion", "clean", *faults, "noisy", "expected", "ρ(σ, noise)", "50/80/95 %", "s", "CPU s")
    for column in columns:
        table.add_column(column, justify="left" if column == "fusion" else "right")
    for fusion, row in found.items():
        coverage = "/".join(f"{100 * share:.0f}" for share in row["coverage"].values())
        shares = (row["clean_accuracy"], *row["by_fault"].values(), row["noisy_accuracy"], row["expected_accuracy"])
        figures = [*(f"{100 * share:.1f}" for share in shares), f"{row['sigma_noise_rank_correlation']:.2f}", coverage]
        table.add_row(fusion, *figures, f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}")
    Console(width=160).print(table)
    print(json.dumps({"fusions": found}))


if __name__ == "__main__":
    main()
