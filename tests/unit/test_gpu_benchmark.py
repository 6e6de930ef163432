"""`benchmarks/gpu.py`, small and on the CPU, where there is no Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_gpu_benchmark_measures_everything_without_ray(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('there is no Ray on this machine')\n", encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "benchmarks/gpu.py", str(out), "--device", "cpu", "--small"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(done.stdout.splitlines()[-1])
    figures = results["figures"]
    parts = ["parity/bfloat16", "parity/float32", "decode/2x8", "decode/3x8", "learner"]
    assert list(figures) == [f"small/{part}" for part in parts]
    assert "error" not in json.dumps(figures)
    assert len((out / "table.txt").read_text().splitlines()) == 1 + len(parts)
    for name in ("bfloat16", "float32"):
        parity = figures[f"small/parity/{name}"]
        assert parity["troubles"] == []
        assert {gap["path"] for gap in parity["paths"]} == {"naive", "packed", "shared_prefix"}
        assert max(gap["to_model"] for gap in parity["paths"]) < parity["bound"]
    assert 0 < figures["small/learner"]["sampler_gap_max"] < 0.1
    assert figures["small/learner"]["grad_norm"] > 0
