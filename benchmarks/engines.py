"""The local engine and vLLM side by side, in one run: sampling as a rollout worker does it, and serving over HTTP.

    python benchmarks/engines.py                     both; vLLM's interpreter is that of `mmrl engine install`, or
                                                     MMRL_VLLM_PYTHON
    python benchmarks/engines.py --only sampling     or serving
    python benchmarks/engines.py --small --engines local --only sampling
                                                     seconds, the tiny model: that it runs

The model is the 16 M-parameter LLaVA of `rl_step.py` (P = 261, at most 24 tokens) in float32, with an adapter of rank 8
that does something, on a GPU where there is one and else on all cores.

    sampling   4, 16 and 64 pictures × 8 completions, pictures and token ids in, completions and log-probs out, no
               picture twice; the local engine as one process and as a process a core
    serving    1, 16 and 64 clients, each of whom asks again once it is answered, a different picture in every request,
               greedy; one server at a time

vLLM runs as `rollout.engine` starts it (compiled, the adapter beside the weights), eager, and at its best, which is the
adapter added into a checkpoint of its own: no run could do that after each step. Its HTTP server runs as it ships,
with its threads unbound, and at its best. Captions are to be the same: the share of greedy ones that are those of the
local engine is in the last line.

CPU seconds are those of all processes of an engine: they tell the same on a busy machine, where the others do not. The
memory of processes is what they have touched at the most (sampling), or what is theirs, with their part of what they
share (serving, after the 64 clients); on a GPU what all of it takes there, of which vLLM takes what it is allowed to.
Nothing is compiled when the first one starts; what one has compiled the next may find.

Prints two tables; the last line is one JSON object, whose `ratio` is the local engine's captions a second over those of
vLLM at its best, in the row where that is least.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from engines_sampling import (
    CACHE,
    GPU,
    MIB,
    RANK,
    Inputs,
    Samplers,
    Way,
    cpu_seconds,
    gpu_memory,
    own_memory,
    vllm_python,
)
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rl_step import build_inputs
from serve import Load, Server, ask, body, free_port, ours, pictures_of, process
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available

from mmrl_ray.config.sections import LoraSection, ModelSection, ScenesSection
from mmrl_ray.config.serving import PolicyDeployment
from mmrl_ray.data.scenes.generator import generate_scenes, scenes_vocabulary
from mmrl_ray.data.writing import write_parquet
from mmrl_ray.errors import ConfigError
from mmrl_ray.policy.generation.vllm import child
from mmrl_ray.policy.generation.vllm.child import EXTENSION
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import add_adapter, save_adapter
from mmrl_ray.policy.tiny import build_tiny_llava

ADAPTER = "tuned"
_GREEDY = 4
"""Pictures of which the captions are compared."""


@dataclass
class Row:
    """One way at one size, or one server with so many clients."""

    name: str
    size: int
    per_second: float
    """Captions."""
    cpu_ms: float
    """A caption, of all processes."""
    start_s: float
    memory: int = 0
    """Bytes."""
    p50_ms: float | None = None
    p99_ms: float | None = None
    tokens: float | None = None
    """A caption."""
    same: float | None = None
    """Share of greedy captions that are the local engine's."""


def build(folder: Path, *, small: bool) -> Inputs:
    """Model, adapter and pictures, made here."""
    if small:
        model = build_tiny_llava(folder / "model", vocabulary=scenes_vocabulary())
        data = folder / "small.parquet"
        write_parquet(data, generate_scenes(ScenesSection(train=8, eval=1, image_size=64))[0])
    else:
        model, data = build_inputs(folder, 16)
    plain = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    policy = load_policy(ModelSection(path=str(model)), device="cpu")
    adapted = add_adapter(policy, LoraSection(r=RANK, alpha=2.0 * RANK), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    adapter, merged = folder / "adapter", folder / "merged"
    save_adapter(adapted, adapter)
    shutil.copytree(model, merged)
    PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().save_pretrained(merged)
    made = Inputs(model, merged, adapter, data)
    return replace(made, sizes=(2, 3), completions=2, tokens=8) if small else made


def ways(engines: Sequence[str], cores: int) -> list[Way]:
    """All that are compared; the first one is what the others are held against."""
    found = [Way("local", "local")]
    if cores > 1 and not GPU:
        found.append(Way(f"local, {cores} processes", "local", processes=cores))
    found += [
        Way("vLLM, compiled, adapter beside", "vllm"),
        Way("vLLM, eager, adapter beside", "vllm", settings={"enforce_eager": True}),
        Way("vLLM, compiled, adapter merged", "vllm", merged=True),
        Way("vLLM, eager, adapter merged", "vllm", settings={"enforce_eager": True}, merged=True),
    ]
    return [way for way in found if way.kind in engines]


def measure_sampling(inputs: Inputs, folder: Path, engines: Sequence[str], cores: int) -> list[Row]:
    """A row a way and size: the median of up to three batches, behind a smaller one that warms up."""
    rows, expected = [], None
    for way in ways(engines, cores):
        samplers = Samplers(way, inputs, folder, cores)
        try:
            greedy = samplers.take(range(_GREEDY), 1, greedy=True)["texts"]
            expected = expected or greedy
            same = statistics.mean(a == b for a, b in zip(greedy, expected, strict=True))
            begin = _GREEDY
            samplers.take(range(begin, begin + inputs.sizes[0]), inputs.completions)
            begin += inputs.sizes[0]
            for size in inputs.sizes:
                found = []
                for _ in range(max(1, min(3, 32 // size))):
                    found.append(samplers.take(range(begin, begin + size), inputs.completions))
                    begin += size
                captions = size * inputs.completions
                middle = sorted(found, key=lambda each: each["seconds"])[len(found) // 2]
                rows.append(
                    Row(
                        way.name,
                        size,
                        captions / middle["seconds"],
                        1e3 * min(each["cpu_s"] for each in found) / captions,
                        samplers.start_s,
                        samplers.gpu_memory() if GPU else middle["memory"],
                        tokens=middle["tokens"] / captions,
                        same=same,
                    )
                )
                told(rows[-1])
        finally:
            samplers.close()
    return rows


def servers(inputs: Inputs, folder: Path, engines: Sequence[str], cores: int) -> dict[str, Callable[[], Any]]:
    """Those that are compared, by name; each is started by a call."""
    config = folder / "serve.yaml"
    served = {"model": {"path": str(inputs.model)}, "adapters": {ADAPTER: str(inputs.adapter)}, "reward": None}
    config.write_text(yaml.safe_dump(served))
    replicas = 1 if GPU else cores
    settings = [f"serving.policy.{bound}_replicas={replicas}" for bound in ("min", "max")]
    on_gpu = ["serving.policy.resources.gpus=1"] if GPU else []
    load = Load("16M", inputs.model, (), 0, 0)
    found: dict[str, Callable[[], Any]] = {}
    if "local" in engines:
        found["mmrl_ray"] = partial(adapted, partial(ours, load, folder, [*settings, *on_gpu], config))
    if "vllm" in engines:
        if "engine" in PolicyDeployment.model_fields:
            engine = {"kind": "vllm", "python": vllm_python(), "args": {} if GPU else {"kv_cache_memory_bytes": CACHE}}
            by_vllm = [*on_gpu, f"serving.policy.engine={json.dumps(engine)}"]  # one replica: it has its own threads
            found["mmrl_ray, engine vLLM"] = partial(adapted, partial(ours, load, folder, by_vllm, config))
        lora = ["--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"{ADAPTER}={inputs.adapter}"]
        best = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(cores)}
        start = partial(peer, inputs, folder)
        found["vLLM's server, as it ships"] = partial(start, inputs.model, lora, {})
        found["vLLM's server, threads unbound"] = partial(start, inputs.model, lora, best)
        found["vLLM's server, adapter merged"] = partial(start, inputs.merged, [], best)
    return found


@contextlib.contextmanager
def adapted(start: Callable[[], Any]) -> Iterator[Server]:
    """Ours, asked for the adapter."""
    with start() as server:
        yield replace(server, model=ADAPTER)


@contextlib.contextmanager
def peer(
    inputs: Inputs, folder: Path, model: Path, arguments: Sequence[str], environment: dict[str, str]
) -> Iterator[Server]:
    """vLLM's own HTTP server, with what reads the checkpoint here: names of weights, and the processor's pictures."""
    port = free_port()
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--generation-config", "vllm"]
    command += ["--served-model-name", "base" if arguments else ADAPTER, *arguments]
    command += ["--worker-extension-cls", f"{EXTENSION}.Adapters", "--limit-mm-per-prompt", '{"video": 0}']
    if not is_torchvision_available():
        command += ["--mm-processor-kwargs", '{"backend": "pil"}']
    if not GPU:
        command += ["--kv-cache-memory-bytes", str(CACHE)]
    settings = {"VLLM_CACHE_ROOT": str(folder / "vllm"), "VLLM_NO_USAGE_STATS": "1", **os.environ, **environment}
    settings["PYTHONPATH"] = str(Path(child.__file__).parent)
    with process(command, folder / "vllm.log", f"http://127.0.0.1:{port}/health", settings):
        yield Server(f"http://127.0.0.1:{port}", ADAPTER, {})


def measure_server(
    name: str, server: Server, pictures: Sequence[bytes], loads: Sequence[tuple[int, int]], start_s: float
) -> tuple[list[Row], dict[int, str]]:
    """A row for each (clients, requests), behind a warm-up; and the captions, by picture.

    Needs a picture for each request and 16 more.
    """
    bodies = [(i, body(server.model, picture)) for i, picture in enumerate(pictures)]
    rows, texts = [], {}
    for place, (clients, requests) in enumerate(((16, 16), *loads)):
        mine, bodies = bodies[:requests], bodies[requests:]
        cpu = cpu_seconds()
        wall, taken, found = asyncio.run(ask(server, mine, clients))
        if place:
            p99 = statistics.quantiles(taken, n=100, method="inclusive")[98]
            row = Row(name, clients, requests / wall, 1e3 * (cpu_seconds() - cpu) / requests, start_s, own_memory())
            rows.append(replace(row, p50_ms=1e3 * statistics.median(taken), p99_ms=1e3 * p99))
            told(rows[-1])
        texts.update(found)
    return rows, texts


def measure_serving(
    inputs: Inputs, folder: Path, engines: Sequence[str], cores: int, loads: Sequence[tuple[int, int]]
) -> list[Row]:
    """Rows of all servers, one after the other."""
    pictures = pictures_of(inputs.data, 16 + sum(requests for _, requests in loads))
    rows: list[Row] = []
    expected: dict[int, str] = {}
    for name, start in servers(inputs, folder, engines, cores).items():
        before = gpu_memory()
        began = time.perf_counter()
        with start() as server:
            found, texts = measure_server(name, server, pictures, loads, time.perf_counter() - began)
            memory = gpu_memory() - before if GPU else found[-1].memory
        expected = expected or texts
        same = statistics.mean(text == expected[i] for i, text in texts.items())
        rows += [replace(row, same=same, memory=memory) for row in found]
    return rows


def told(row: Row) -> None:
    """While it runs."""
    print(f"{row.name}, {row.size}: {row.per_second:.1f}/s, {row.cpu_ms:.0f} CPU ms", file=sys.stderr, flush=True)


def ratios(rows: Sequence[Row]) -> dict[int, float]:
    """By size, captions a second of the local engine at its best over those of vLLM at its best."""
    made: dict[int, float] = {}
    for size in dict.fromkeys(row.size for row in rows):
        of = {
            is_vllm: [r.per_second for r in rows if r.size == size and ("vLLM" in r.name) == is_vllm]
            for is_vllm in (True, False)
        }
        if of[True] and of[False]:
            made[size] = max(of[False]) / max(of[True])
    return made


def report(sampling: Sequence[Row], serving: Sequence[Row], inputs: Inputs) -> None:
    """Both tables, then the JSON line."""
    console = Console(width=120)
    place = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} cores"
    if sampling:
        table = Table(
            title=f"sampling, {inputs.completions} completions of ≤ {inputs.tokens} tokens a picture, {place}"
        )
        columns = ("engine", "pictures", "captions a second", "CPU ms a caption", "memory MiB", "starts in s")
        for column in columns:
            table.add_column(column, justify="left" if column == "engine" else "right")
        for r in sampling:
            figures = f"{r.per_second:.1f}", f"{r.cpu_ms:.1f}", f"{r.memory / MIB:.0f}", f"{r.start_s:.0f}"
            table.add_row(r.name, str(r.size), *figures)
        console.print(table)
    if serving:
        table = Table(title=f"serving, greedy captions of ≤ {inputs.tokens} tokens, {place}")
        names = (
            "server",
            "clients",
            "captions a second",
            "p50 ms",
            "p99 ms",
            "CPU ms a caption",
            "memory MiB",
            "starts",
        )
        for column in names:
            table.add_column(column, justify="left" if column == "server" else "right")
        for r in serving:
            figures = f"{r.per_second:.1f}", f"{r.p50_ms:.0f}", f"{r.p99_ms:.0f}", f"{r.cpu_ms:.0f}"
            table.add_row(r.name, str(r.size), *figures, f"{r.memory / MIB:.0f}", f"{r.start_s:.0f}")
        console.print(table)
    found = {"sampling": ratios(sampling), "serving": ratios(serving)}
    every = [ratio for by_size in found.values() for ratio in by_size.values()]
    line = {
        "ratio": min(every) if every else None,
        "ratios": found,
        "same_texts": {row.name: row.same for row in (*sampling, *serving)},
        "device": place,
        "sampling": [asdict(row) for row in sampling],
        "serving": [asdict(row) for row in serving],
    }
    print(json.dumps(line))


def engines_here(asked: str | None) -> list[str]:
    """Those that are asked for; by default all that are on this machine."""
    if asked is not None:
        return asked.split(",")
    try:
        vllm_python()
    except ConfigError as error:
        print(f"the local engine alone: {error}", file=sys.stderr)
        return ["local"]
    return ["local", "vllm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", help="local,vllm; by default all that there are")
    parser.add_argument("--only", choices=["sampling", "serving"])
    parser.add_argument("--small", action="store_true", help="the tiny model and a few requests")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="threads, or replicas")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mmrl-bench-"))
    engines = engines_here(args.engines)
    loads = ((1, 4), (16, 16)) if args.small else ((1, 12), (16, 96), (64, 192))
    try:
        inputs = build(folder, small=args.small)
        sampling = [] if args.only == "serving" else measure_sampling(inputs, folder, engines, args.cores)
        serving = [] if args.only == "sampling" else measure_serving(inputs, folder, engines, args.cores, loads)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(sampling, serving, inputs)


if __name__ == "__main__":
    main()
