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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rl_step import COMPLETION, GROUP_SIZE, PROMPT, build_inputs
from serve import Load, Server, ask, body, free_port, ours, pictures_of, process
from transformers import AutoModelForImageTextToText

from mmrl_ray.config.learner import EngineSection
from mmrl_ray.config.sections import LoraSection, ModelSection, ScenesSection
from mmrl_ray.config.serving import PolicyDeployment
from mmrl_ray.data.samples import Sample
from mmrl_ray.data.scenes.generator import generate_scenes, scenes_vocabulary
from mmrl_ray.data.writing import write_parquet
from mmrl_ray.errors import ConfigError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy.generation.base import DecodeRequest, GenerationEngine
from mmrl_ray.policy.generation.local import LocalEngine
from mmrl_ray.policy.generation.vllm import engine as vllm_engine
from mmrl_ray.policy.generation.vllm.environment import program
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_state, add_adapter, load_adapter, save_adapter
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.memory import DecodeLimits
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.policy.vision import VisionCache

RANK, VERSION, ADAPTER = 8, 1, "tuned"
MIB = 1 << 20
_FEATURES = 256 * MIB
_CACHE = 1 << 30
"""Of keys, for vLLM on a CPU: enough for all that is asked here; its default is a part of the machine's memory."""
_TIMEOUT_S = 600.0
_GREEDY = 4
"""Pictures of which the captions are compared."""
_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Way:
    """An engine, and how it is run."""

    name: str
    kind: str
    """`local` or `vllm`."""
    processes: int = 1
    """Which share out the groups, and the cores."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of `rollout.engine`."""
    merged: bool = False
    """Whether the checkpoint has the adapter in its weights, and the engine none."""


@dataclass(frozen=True)
class Inputs:
    """What both engines are given."""

    model: Path
    merged: Path
    """The same with the adapter in its weights."""
    adapter: Path
    data: Path
    sizes: tuple[int, ...] = (4, 16, 64)
    """Pictures of a batch."""
    completions: int = GROUP_SIZE
    tokens: int = COMPLETION


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
    plain.save_pretrained(model)  # under the names that vLLM reads
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


# -- sampling: a process for each way, which is told what to do line by line -------------------------------------------


def sampler(way: Way, inputs: Inputs, threads: int, began: float) -> None:
    """The process: a line of JSON in, a line out."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is not for who asks
    torch.set_num_threads(threads)
    path = inputs.merged if way.merged else inputs.model
    policy = load_policy(ModelSection(path=str(path)), device="cuda" if _GPU else "cpu")
    if way.merged:
        add_adapter(policy, LoraSection(r=RANK), 0)  # which changes nothing
    else:
        load_adapter(policy, inputs.adapter)
    engine = local(policy, inputs) if way.kind == "local" else vllm(policy, way, threads)
    engine.load(VERSION, adapter_state(policy.model))
    print(json.dumps({"start_s": time.time() - began}), file=out)
    for line in sys.stdin:
        told = json.loads(line)
        names = ("images", "n", "greedy")
        print(json.dumps(sample(engine, policy, inputs, *(told[name] for name in names))), file=out)
    engine.close()


def local(policy: Policy, inputs: Inputs) -> GenerationEngine:
    limits = DecodeLimits.of(policy, inputs.tokens)
    cache = VisionCache(_FEATURES)
    return LocalEngine(VersionedPolicy(policy), cache, max_rows=limits.max_rows, prefill_tokens=limits.prefill_tokens)


def vllm(policy: Policy, way: Way, threads: int) -> GenerationEngine:
    """As a rollout worker starts it; or without LoRA, which is nothing that a run could ask for."""
    args = {} if _GPU else {"kv_cache_memory_bytes": _CACHE}
    cfg = EngineSection(kind="vllm", python=vllm_python(), start_timeout_s=_TIMEOUT_S, args=args, **way.settings)

    def plain(python: str, asked: dict[str, Any], **others: Any) -> Any:
        kept = {name: value for name, value in asked["args"].items() if "lora" not in name}
        return own(python, {**asked, "args": kept}, **others)

    own = vllm_engine.VllmProcess
    changed = mock.patch.object(vllm_engine, "VllmProcess", plain) if way.merged else contextlib.nullcontext()
    with changed:
        return vllm_engine.start_engine(
            policy, cfg, VisionCache(_FEATURES), revision=None, threads=threads, timeout_s=_TIMEOUT_S
        )


def vllm_python() -> str:
    return program(os.environ.get("MMRL_VLLM_PYTHON"))


def sample(
    engine: GenerationEngine, policy: Policy, inputs: Inputs, images: Sequence[int], n: int, greedy: bool
) -> dict[str, Any]:
    """Completions of pictures that are new, by their numbers; what it took, from pictures to completions."""
    count = max(images) + 1
    samples = [Sample(str(i), (picture,), PROMPT) for i, picture in enumerate(pictures_of(inputs.data, count))]
    samples = [samples[i] for i in images]
    begun, cpu = time.perf_counter(), cpu_seconds()
    prompts = encode_prompts(policy, samples)
    if not engine.capabilities.vision_features:  # it makes its prompts itself: these are the scorer's
        begun, cpu = time.perf_counter(), cpu_seconds()
        prompts = [engine.prepared(*each) for each in zip(prompts, samples, strict=True)]
    outputs = engine.generate(
        [
            DecodeRequest(prompt, n, SamplingParams(max_new_tokens=inputs.tokens, seed=i, greedy=greedy))
            for i, prompt in zip(images, prompts, strict=True)
        ]
    )
    taken, spent = time.perf_counter() - begun, cpu_seconds() - cpu
    made = [completion for output in outputs for completion in output.completions]
    return {
        "seconds": taken,
        "cpu_s": spent,
        "tokens": sum(completion.token_ids.numel() for completion in made),
        "memory": peak_memory(),
        "texts": [completion.text for completion in made] if greedy else [],
    }


class Samplers:
    """The processes of a way, seen from outside."""

    def __init__(self, way: Way, inputs: Inputs, folder: Path, cores: int) -> None:
        """Starts them and waits for them."""
        self._log = (folder / "sampling.log").open("wb")
        told = json.dumps(
            {"way": asdict(way), "inputs": asdict(inputs), "threads": max(1, cores // way.processes)}, default=str
        )
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // way.processes))}
        environment.setdefault("VLLM_CACHE_ROOT", str(folder / "vllm"))  # nothing that an earlier run has compiled
        began = str(time.time())
        self._running = [
            subprocess.Popen(
                [sys.executable, __file__, "--sampler", told, "--began", began],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                text=True,
            )
            for _ in range(way.processes)
        ]
        self._before = gpu_memory()
        self.start_s = max(answer["start_s"] for answer in map(self._answer, self._running))

    def take(self, images: Sequence[int], n: int, *, greedy: bool = False) -> dict[str, Any]:
        """What `sample` says, of all together."""
        begun = time.perf_counter()
        busy = []
        for i, each in enumerate(self._running):
            if mine := images[i :: len(self._running)]:
                assert each.stdin is not None
                each.stdin.write(json.dumps({"images": list(mine), "n": n, "greedy": greedy}) + "\n")
                each.stdin.flush()
                busy.append(each)
        with ThreadPoolExecutor(len(busy)) as threads:
            answers = list(threads.map(self._answer, busy))
        del begun
        texts = {}
        for i, answer in enumerate(answers):
            texts.update(zip(images[i :: len(self._running)], answer["texts"], strict=False))
        return {
            "seconds": max(answer["seconds"] for answer in answers),
            **{name: sum(answer[name] for answer in answers) for name in ("cpu_s", "tokens", "memory")},
            "texts": [texts[i] for i in images if i in texts],
        }

    def gpu_memory(self) -> int:
        """Bytes that they have taken there."""
        return gpu_memory() - self._before

    def close(self) -> None:
        """Ends them."""
        for each in self._running:
            assert each.stdin is not None
            each.stdin.close()
        for each in self._running:
            each.wait(60)
        self._log.close()

    def _answer(self, each: subprocess.Popen[str]) -> dict[str, Any]:
        assert each.stdout is not None
        line = each.stdout.readline()
        if not line:
            sys.exit(f"the process that samples ended:\n{Path(self._log.name).read_text(errors='replace')[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def ways(engines: Sequence[str], cores: int) -> list[Way]:
    """All that are compared; the first one is what the others are held against."""
    found = [Way("local", "local")]
    if cores > 1 and not _GPU:
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
                        samplers.gpu_memory() if _GPU else middle["memory"],
                        tokens=middle["tokens"] / captions,
                        same=same,
                    )
                )
                told(rows[-1])
        finally:
            samplers.close()
    return rows


# -- serving -----------------------------------------------------------------------------------------------------------


def servers(inputs: Inputs, folder: Path, engines: Sequence[str], cores: int) -> dict[str, Callable[[], Any]]:
    """Those that are compared, by name; each is started by a call."""
    config = folder / "serve.yaml"
    config.write_text(
        yaml.safe_dump({"model": {"path": str(inputs.model)}, "adapters": {ADAPTER: str(inputs.adapter)}})
    )
    replicas = 1 if _GPU else cores
    settings = [f"serving.policy.{bound}_replicas={replicas}" for bound in ("min", "max")]
    on_gpu = ["serving.policy.resources.gpus=1"] if _GPU else []
    load = Load("16M", inputs.model, (), 0, 0)
    found: dict[str, Callable[[], Any]] = {}
    if "local" in engines:
        found["mmrl_ray"] = partial(adapted, partial(ours, load, folder, [*settings, *on_gpu], config))
    if "vllm" in engines:
        if "engine" in PolicyDeployment.model_fields:
            engine = {"kind": "vllm", "python": vllm_python(), "args": {} if _GPU else {"kv_cache_memory_bytes": _CACHE}}
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
    """vLLM's own HTTP server."""
    port = free_port()
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--generation-config", "vllm"]
    command += ["--served-model-name", "base" if arguments else ADAPTER, *arguments]
    if not _GPU:
        command += ["--kv-cache-memory-bytes", str(_CACHE)]
    settings = {"VLLM_CACHE_ROOT": str(folder / "vllm"), "VLLM_NO_USAGE_STATS": "1", **os.environ, **environment}
    with process(command, folder / "vllm.log", f"http://127.0.0.1:{port}/health", settings):
        yield Server(f"http://127.0.0.1:{port}", ADAPTER, {})


def measure_server(
    name: str, server: Server, pictures: Sequence[bytes], loads: Sequence[tuple[int, int]], start_s: float
) -> tuple[list[Row], dict[int, str]]:
    """A row for each (clients, requests), behind a warm-up; and the captions, by picture.

    Needs a picture for each request and 16 more.
    """
    bodies = [(i, body(server.model, picture)) for i, picture in enumerate(pictures)]
    before = 0
    rows, texts = [], {}
    for clients, requests in ((16, 16), *loads):
        mine, bodies = bodies[:requests], bodies[requests:]
        cpu = cpu_seconds()
        wall, taken, found = asyncio.run(ask(server, mine, clients))
        if before:
            p99 = statistics.quantiles(taken, n=100, method="inclusive")[98]
            row = Row(name, clients, requests / wall, 1e3 * (cpu_seconds() - cpu) / requests, start_s, own_memory())
            rows.append(replace(row, p50_ms=1e3 * statistics.median(taken), p99_ms=1e3 * p99))
            told(rows[-1])
        before += requests
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
            memory = gpu_memory() - before if _GPU else found[-1].memory
        expected = expected or texts
        same = statistics.mean(text == expected[i] for i, text in texts.items())
        rows += [replace(row, same=same, memory=memory) for row in found]
    return rows


# -- what it takes -----------------------------------------------------------------------------------------------------


def processes() -> list[psutil.Process]:
    """This one and all that it has started."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def cpu_seconds() -> float:
    """Of all of them so far."""
    total = 0.0
    for each in processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system
    return total


def peak_memory() -> int:
    """Bytes: the most that each of them has touched."""
    total = 0
    for each in processes():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{each.pid}/status").read_text()
            total += next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)
    return total


def own_memory() -> int:
    """Bytes of those that this one has started, what they share divided among them."""
    total = 0
    for each in processes()[1:]:
        with contextlib.suppress(psutil.Error):
            total += each.memory_full_info().pss
    return total


def gpu_memory() -> int:
    """Bytes in use on the GPUs that are seen here, by anybody."""
    if not _GPU:
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return sum(int(each) for each in found) * MIB


def told(row: Row) -> None:
    """While it runs."""
    print(f"{row.name}, {row.size}: {row.per_second:.1f}/s, {row.cpu_ms:.0f} CPU ms", file=sys.stderr, flush=True)


# -- what is said ------------------------------------------------------------------------------------------------------


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
    place = torch.cuda.get_device_name() if _GPU else f"{os.cpu_count()} cores"
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
    parser.add_argument("--sampler", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sampler:
        told = json.loads(args.sampler)
        paths = {name: Path(told["inputs"][name]) for name in ("model", "merged", "adapter", "data")}
        sampler(Way(**told["way"]), Inputs(**{**told["inputs"], **paths}), told["threads"], args.began)
        return
    folder = Path(tempfile.mkdtemp(prefix="mmrl-bench-"))
    engines = engines_here(args.engines)
    loads = ((1, 4), (16, 16)) if args.small else ((1, 16), (16, 128), (64, 256))
    try:
        inputs = build(folder, small=args.small)
        sampling = [] if args.only == "serving" else measure_sampling(inputs, folder, engines, args.cores)
        serving = [] if args.only == "sampling" else measure_serving(inputs, folder, engines, args.cores, loads)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(sampling, serving, inputs)


if __name__ == "__main__":
    main()
