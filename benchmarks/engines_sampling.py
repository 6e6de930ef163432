"""The processes of `engines.py` that sample, the engines that they have, and what a process takes.

A process has a model with its adapter and one engine, which is told line by line what to sample: only so have engines
that are compared neither each other's memory nor each other's threads. Run as a program it is such a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from rl_step import COMPLETION, GROUP_SIZE, PROMPT
from serve import pictures_of

from mmrl_ray.config.engine import EngineSection
from mmrl_ray.config.sections import LoraSection, ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy.generation.base import DecodeRequest, GenerationEngine
from mmrl_ray.policy.generation.local import LocalEngine
from mmrl_ray.policy.generation.vllm import engine as vllm_engine
from mmrl_ray.policy.generation.vllm.environment import program
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_state, add_adapter, load_adapter
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.memory import DecodeLimits
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import VisionCache

RANK, VERSION = 8, 1
MIB = 1 << 20
CACHE = 1 << 30
"""Of keys, for vLLM on a CPU: enough for all that is asked here; its default is a part of the machine's memory."""
GPU = torch.cuda.is_available()
_FEATURES = 256 * MIB
_TIMEOUT_S = 600.0


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


def sampler(way: Way, inputs: Inputs, threads: int, began: float) -> None:
    """The process: a line of JSON in, a line out."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is not for who asks
    torch.set_num_threads(threads)
    path = inputs.merged if way.merged else inputs.model
    policy = load_policy(ModelSection(path=str(path)), device="cuda" if GPU else "cpu")
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
    args = {} if GPU else {"kv_cache_memory_bytes": CACHE}
    cfg = EngineSection(kind="vllm", python=vllm_python(), start_timeout_s=_TIMEOUT_S, args=args, **way.settings)

    def plain(python: str, asked: dict[str, Any], **others: Any) -> Any:
        kept = {name: value for name, value in asked["args"].items() if "lora" not in name}
        return own(python, {**asked, "args": kept}, **others)

    own = vllm_engine.VllmProcess
    with contextlib.ExitStack() as changed:
        if way.merged:
            changed.enter_context(mock.patch.object(vllm_engine, "VllmProcess", plain))
            changed.enter_context(mock.patch.object(vllm_engine.VllmEngine, "try_adapter", return_value=None))
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
        threads = max(1, cores // way.processes)
        asked = {"way": asdict(way), "inputs": asdict(inputs), "threads": threads, "began": time.time()}
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        environment.setdefault("VLLM_CACHE_ROOT", str(folder / "vllm"))  # nothing that an earlier run has compiled
        self._running = [
            subprocess.Popen(
                [sys.executable, __file__, json.dumps(asked, default=str)],
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
        busy = []
        for i, each in enumerate(self._running):
            if mine := images[i :: len(self._running)]:
                assert each.stdin is not None
                each.stdin.write(json.dumps({"images": list(mine), "n": n, "greedy": greedy}) + "\n")
                each.stdin.flush()
                busy.append(each)
        with ThreadPoolExecutor(len(busy)) as threads:
            answers = list(threads.map(self._answer, busy))
        texts: dict[int, str] = {}
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
    if not GPU:
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return sum(int(each) for each in found) * MIB


def main() -> None:
    told = json.loads(sys.argv[1])
    paths = {name: Path(told["inputs"][name]) for name in ("model", "merged", "adapter", "data")}
    sampler(Way(**told["way"]), Inputs(**{**told["inputs"], **paths}), told["threads"], told["began"])


if __name__ == "__main__":
    main()
