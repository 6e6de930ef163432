"""Samples a second of the whole RL step, against TRL's GRPOTrainer on the same model and batch, in one run.

    python benchmarks/rl_step.py --peer trl

The model is a 16 M-parameter LLaVA with random weights: a prompt of P = 261 tokens (256 of them the image), up to
C = 24 completion tokens, 4 images of 8 completions a step, LoRA r = 8 on the language model's linear layers, KL on,
2 threads, float32 on the CPU. What is timed here is the real pipeline: rollout actors, reward, step plan, learner
workers, weight publishing, rollout log. Its two threads are two rollout workers, and then two learners, of one thread
each: two threads inside one process would wait for each other at every matrix product, and for whatever else the
machine does. Both sides are warmed up; each runs by itself. The peer runs twice: as it ships, with gradient
checkpointing (`ratio`), and without, the faster choice where memory is plenty (`ratio_no_checkpointing`).

How near all that comes to what the processor can do, phase by phase, is found by `rl_phases.py` in the same run: FLOP,
seconds, and the share of the fastest large product that one core was seen to compute. A ratio to a peer moves with the
machine, such a share less so.

Prints tables of where the time goes; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rl_phases import LEARNER, WORKER, Phase, gemm_peak, measure

from mmrl_ray.config import Config
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.scenes.generator import generate_scenes, scenes_vocabulary
from mmrl_ray.data.writing import write_parquet
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.training.train import train

PROMPT = "describe"
"""With the chat template's 4 tokens and 256 image tokens it makes P = 261."""
IMAGES, GROUP_SIZE, COMPLETION, KL = 4, 8, 24, 0.04
_ALONE_WARMUP, _ALONE_STEPS = 2, 5
"""Steps of `rl_phases.measure`."""
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def build_inputs(folder: Path, steps: int) -> tuple[Path, Path]:
    """(model folder, Parquet file): made, not downloaded."""
    words = [*scenes_vocabulary(), *(f"word{i}" for i in range(1900))]
    model = build_tiny_llava(
        folder / "model",
        vocabulary=words,
        image_size=128,
        patch_size=8,
        hidden=384,
        layers=6,
        heads=6,
        vision_hidden=256,
        vision_layers=4,
        vision_heads=4,
    )
    train_samples, _ = generate_scenes(ScenesSection(train=IMAGES * steps, eval=1, image_size=128))
    data = folder / "data" / "train.parquet"
    data.parent.mkdir()
    write_parquet(data, train_samples)
    return model, data


def config(folder: Path, model: Path, data: Path, *, steps: int, threads: int) -> Config:
    """Of the run: `threads` rollout workers, then as many learners, of one thread each."""
    actor = {"cpus": 1 / threads, "threads": 1}
    return Config.model_validate(
        {
            "run": {"name": "bench", "root": str(folder / "runs")},
            "model": {"path": str(model), "dtype": "float32", "lora": {"r": 8, "alpha": 16}},
            "data": {"train": str(data), "prompt": PROMPT},
            "algorithm": "grpo",
            "rollout": {
                "group_size": GROUP_SIZE,
                "max_new_tokens": COMPLETION,
                "groups_per_assignment": IMAGES // threads,
                "workers": threads,
            },
            "learner": {
                "steps": steps,
                "groups_per_step": IMAGES,
                "kl": {"weight": KL},
                "checkpoint_every": steps,
                "workers": threads,
            },
            "resources": {"learner": actor, "rollout": actor},
        }
    )


def measure_mmrl(cfg: Config, *, warmup: int) -> dict[str, Any]:
    """One run of the product; figures of the steps after the warm-up, out of its metrics.jsonl."""
    run = train(cfg)
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()][warmup:]
    seconds = [line["seconds/step"] for line in lines]
    # Sampling, reference and the like are sums over the workers, which run side by side.
    phases = sorted({key for line in lines for key in line if key.startswith("seconds/") and key != "seconds/step"})
    return {
        "samples_per_second": IMAGES * GROUP_SIZE * len(lines) / sum(seconds),
        "seconds_per_step": statistics.median(seconds),
        "phases": {
            key.removeprefix("seconds/"): statistics.median(line.get(key, 0.0) for line in lines) for key in phases
        },
        "completion_length": statistics.mean(line["completion/length_mean"] for line in lines),
        "shared_prefix": all(line["shared_prefix"] for line in lines),
    }


def measure_trl(
    folder: Path, model: Path, data: Path, *, checkpointing: bool, steps: int, threads: int
) -> dict[str, Any]:
    """The peer, in a process of its own, after one step of warm-up."""
    arguments = {
        "model": model,
        "data": data,
        "out": folder / "peer",
        "images": IMAGES,
        "group-size": GROUP_SIZE,
        "completion": COMPLETION,
        "targets": TARGETS,
        "kl": KL,
        "warmup": 1,
        "steps": steps,
        "threads": threads,
    }
    command = [sys.executable, str(Path(__file__).with_name("peer_trl.py"))]
    command += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    if not checkpointing:
        command.append("--no-checkpointing")
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        sys.exit(f"the peer failed:\n{done.stderr[-2000:]}\nIs it installed? pip install -e '.[bench]'")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["trl", "none"], default="trl")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--peer-steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mmrl-bench-"))
    try:
        steps = args.warmup + args.steps
        model, data = build_inputs(folder, max(steps, _ALONE_WARMUP + _ALONE_STEPS + 2))
        cfg = config(folder, model, data, steps=steps, threads=args.threads)
        ours = measure_mmrl(cfg, warmup=args.warmup)
        peak = gemm_peak()
        phases = measure(cfg, warmup=_ALONE_WARMUP, steps=_ALONE_STEPS)
        peers = {
            name: measure_trl(folder, model, data, checkpointing=on, steps=args.peer_steps, threads=args.threads)
            for name, on in (("", True), ("no_checkpointing", False))
            if args.peer == "trl"
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shares = report_phases(ours, phases, peak, threads=args.threads)
    report(ours, peers, shares)


def report_phases(
    ours: dict[str, Any], phases: dict[str, Phase], peak: tuple[float, str], *, threads: int
) -> dict[str, Any]:
    """The table of phases; returns its figures, of `threads` processes that each have such a part."""
    rate, product = peak
    table = Table(title=f"a step's phases; one core's peak is {rate / 1e9:.0f} GFLOP/s ({product})")
    titles = ("", "GFLOP", "CPU s", "of the peak", "products alone", "others", "GB they touch")
    for column in titles:
        table.add_column(column, justify="left" if not column else "right")
    rows: dict[str, Phase] = {**phases, "the learner": Phase.sum(phases[name] for name in LEARNER)}
    rows["altogether"] = Phase.sum(phases.values())
    for name, phase in rows.items():
        table.add_row(
            name,
            f"{threads * phase.flop / 1e9:.1f}",
            f"{threads * phase.seconds:.3f}",
            f"{phase.flop / rate / phase.seconds:.0%}" if phase.flop and phase.seconds else "",
            f"{phase.flop / rate / phase.alone:.0%}" if phase.alone else "",
            f"{threads * phase.operations:,}",
            f"{threads * phase.nbytes / 1e9:.2f}",
        )
    Console(width=100).print(table)
    # In the run: sampling and scoring are summed over the workers, the learner's seconds are those of its first rank.
    seconds = {"sample": ours["phases"]["sample"], "reference": ours["phases"]["reference"]}
    seconds["forward_backward"] = threads * ours["phases"]["forward_backward"]
    flop = {"sample": sum(phases[name].flop for name in WORKER), "reference": phases["reference"].flop}
    flop["forward_backward"] = rows["the learner"].flop
    of_run = {name: threads * flop[name] / rate / taken for name, taken in seconds.items()}
    of_run["step"] = rows["altogether"].flop / rate / ours["seconds_per_step"]
    print("of the peak in the run itself: " + ", ".join(f"{name} {share:.0%}" for name, share in of_run.items()))
    alone = {name: phase.flop / rate / phase.alone for name, phase in rows.items() if phase.alone}
    return {
        "core_gflop_per_second": rate / 1e9,
        "share": {name: phase.flop / rate / phase.seconds for name, phase in rows.items() if phase.flop},
        "share_of_products_alone": alone,
        "share_in_run": of_run,
        "gflop": {name: threads * phase.flop / 1e9 for name, phase in rows.items() if phase.flop},
        "cpu_seconds": {name: threads * phase.seconds for name, phase in rows.items()},
    }


def report(ours: dict[str, Any], peers: dict[str, dict[str, Any]], shares: dict[str, Any]) -> None:
    """The table, then the JSON line."""
    table = Table(title=f"{IMAGES} images x {GROUP_SIZE} completions a step, P = 261, C <= {COMPLETION}")
    for column in ("", "seconds a step", "samples a second", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("mmrl_ray", f"{ours['seconds_per_step']:.2f}", f"{ours['samples_per_second']:.2f}", "")
    for phase, seconds in ours["phases"].items():
        table.add_row(f"  {phase}", f"{seconds:.2f}", "", "")
    ratios = {name: ours["samples_per_second"] / peer["samples_per_second"] for name, peer in peers.items()}
    for name, peer in peers.items():
        title = f"TRL GRPOTrainer {name.replace('_', ' ')}"
        rate = f"{peer['samples_per_second']:.2f}"
        table.add_row(title, f"{peer['seconds_per_step']:.2f}", rate, f"{ratios[name]:.2f}")
    console = Console()
    console.print(table)
    console.print(f"mean completion {ours['completion_length']:.1f} tokens; shared prefix: {ours['shared_prefix']}")
    figures = {
        "ratio": ratios.get(""),
        "ratio_no_checkpointing": ratios.get("no_checkpointing"),
        "samples_per_second": ours["samples_per_second"],
        "peer_samples_per_second": peers[""]["samples_per_second"] if peers else None,
        "seconds": {"step": ours["seconds_per_step"], **ours["phases"]},
        **shares,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
