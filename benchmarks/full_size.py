"""Kernels and bytes of a training step at full size, counted without weights and without a GPU.

    python benchmarks/full_size.py configs/qwen2.5-vl-3b-coco.yaml [--layers 36] [--device cuda]

A model in the shape of Qwen2.5-VL-3B is made of fake tensors (`tests/support/full_size.py`): a decode step of one
assignment, the reference's scores of it, and one update over a micro-batch as large as the config lets it be; beside
each peak stands what `mmrl train --dry-run` estimates. `--device` names whose acceleration the model gets
(`mmrl_ray/policy/<device>.py`); "meta" has none.

Prints lines; the last one is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests.support

from mmrl_ray.config.load import load_config
from tests.support.full_size import count, estimates

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    cfg = load_config(given.config)
    found = count(cfg, given.layers, given.device)
    for name, figures in found.items():
        print(told(name, figures))
    for name, (estimated, counted) in (comparison := estimates(cfg, given.layers, found)).items():
        print(f"{name:32} estimated {estimated / GIB:.2f} GiB, counted {counted / GIB:.2f} GiB")
    print(json.dumps({"layers": given.layers, **found, "estimates": comparison}))


def told(name: str, figures: dict[str, int]) -> str:
    """One line."""
    parts = [
        f"{key.removesuffix('_bytes')} {value / GIB:.2f} GiB" if key.endswith("bytes") else f"{key} {value:,}"
        for key, value in figures.items()
    ]
    return f"{name:32} {', '.join(parts)}"


if __name__ == "__main__":
    main()
