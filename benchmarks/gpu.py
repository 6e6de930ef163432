"""What one GPU makes of the model's part of a training step: numbers, speed and memory, at the size of Qwen2.5-VL-3B.

    python benchmarks/gpu.py OUT                      one CUDA GPU, below eight minutes, no network, no Ray
    python benchmarks/gpu.py OUT --device cpu --small seconds: that it runs

It needs torch, transformers, peft, pyarrow, pydantic and Pillow. The model is made from its config with random weights
(`tests/support/qwen_3b.py`), at full size and at about half of it, in bfloat16, with an adapter of rank 32 that does
something:

    parity     sampler, learner's paths and transformers' `generate` against each other, in bfloat16 and in float32
    decode     tokens a second of 16 × 8 and 64 × 8 captions of 64 tokens behind 404, against `generate` with the same
               prompts, merged weights and numbers of tokens; vision tower and prompts included
    learner    an update over the first of these, on-policy: tokens a second of the language model, FLOP of the products
               that are made once over what the GPU does (its peak where it is known, else a large product's in this
               run), peak memory against the estimate of `mmrl train --dry-run`, and the sampler gap

Writes `results.json` and `table.txt` into OUT, and a figure that could not be had as its error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project and tests.support, installed or not

from mmrl_ray.config import Config
from mmrl_ray.experience.carriers import EncodedPrompt, RolloutGroup, SamplingParams
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.planning.estimate import PROCESS, batch_plan, learner_memory, rollout_memory
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, GroupOutput, decode_groups
from mmrl_ray.policy.lora.adapter import add_adapter
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.memory import ModelShape, model_shape
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import compare
from mmrl_ray.policy.prompts import encode_prompts
from tests.support import qwen_3b

GIB = 2**30
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bfloat16 FLOP a second by what a GPU's name holds (NVIDIA's data sheets)."""
G, T = 8, 64


class Bench:
    """One device, and how large everything is."""

    def __init__(self, device: str, small: bool) -> None:
        self.device = torch.device(device)
        self.small = small
        self.sizes = {"small": qwen_3b.SMALL} if small else {"3B": {}, "half": qwen_3b.HALF}
        self.batches = (2, 3) if small else (16, 64)
        self.tokens = 8 if small else T
        self.picture = {"width": 84, "height": 56} if small else {"width": 644, "height": 476}

    def sync(self) -> None:
        """Waits for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int = 2) -> float:
        """Median of some runs behind one that warms up."""
        work()
        found = []
        for _ in range(repeats):
            self.sync()
            start = time.perf_counter()
            work()
            self.sync()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def peak(self, work: Callable[[], Any]) -> int:
        """Bytes of tensors at the most, 0 where the device does not say."""
        if self.device.type != "cuda":
            work()
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()

    def policy(self, size: str, dtype: torch.dtype) -> tuple[Policy, ModelShape]:
        """With an adapter whose effect is a few percent of the layers' own."""
        policy = qwen_3b.make_policy(str(self.device), dtype, self.sizes[size])
        lora = self.config(1).model.lora
        shape = model_shape(policy.hf_model, lora, dtype)
        model = add_adapter(policy, lora, 0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        return policy, shape

    def config(self, groups: int) -> Config:
        """A run of this size."""
        gpus = 1 if self.device.type == "cuda" else 0
        return Config.model_validate(
            {
                "run": {"name": "gpu"},
                "model": {"path": "x", "lora": {"r": 32, "alpha": 64}},
                "data": {"train": "x"},
                "rollout": {"group_size": G, "max_new_tokens": self.tokens, "groups_per_assignment": groups},
                "learner": {
                    "steps": 10,
                    "groups_per_step": groups,
                    "micro_batch_tokens": 300 if self.small else 4096,
                    "max_sampler_gap": 0,
                    "kl": {"weight": 0.0},
                },
                "resources": {"learner": {"gpus": gpus}, "rollout": {"gpus": gpus}},
            }
        )

    def prompts(self, policy: Policy, count: int) -> list[EncodedPrompt]:
        """Of pictures of noise, all of one size."""
        return encode_prompts(policy, qwen_3b.samples(count, **self.picture))


def parity(bench: Bench, size: str, dtype: torch.dtype) -> dict[str, Any]:
    """Largest |Δ log-prob| in nats between any two ways."""
    policy, _ = bench.policy(size, dtype)
    found = compare(policy, bench.prompts(policy, 2), others=("packed",))
    return {
        "path": found.path,
        "bound": found.bound,
        "sampler_to_generate": found.sampler,
        "vision_features_kept": found.inject_vision,
        "troubles": list(found.troubles),
        "paths": [asdict(gap) for gap in found.gaps],
    }


def decode(bench: Bench, policy: Policy, shape: ModelShape, groups: int) -> tuple[dict[str, Any], list[GroupOutput]]:
    """Tokens a second of this project's loop and of `generate`."""
    prompts = bench.prompts(policy, groups)
    versions = VersionedPolicy(policy)
    endless = replace(policy, eos_token_ids=())  # every completion is as long as it may be
    decoder = Decoder(endless, max_rows=max(256, G))
    requests = [DecodeRequest(p, G, SamplingParams(max_new_tokens=bench.tokens, seed=i)) for i, p in enumerate(prompts)]
    made: list[GroupOutput] = []

    def ours() -> None:
        with versions.merged():
            made[:] = decode_groups(decoder, requests)

    inputs = {
        "input_ids": torch.stack([p.input_ids for p in prompts]),
        "attention_mask": torch.ones(groups, prompts[0].input_ids.numel(), dtype=torch.int64),
        **{
            name: torch.cat([p.model_inputs[name] for p in prompts])
            if name != "mm_token_type_ids"
            else torch.stack([p.model_inputs[name] for p in prompts])
            for name in prompts[0].model_inputs
        },
    }
    inputs = {name: value.to(bench.device) for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(policy.dtype)

    def theirs() -> None:
        length = {"max_new_tokens": bench.tokens, "min_new_tokens": bench.tokens}
        with versions.merged(), torch.no_grad():
            policy.hf_model.generate(**inputs, **length, do_sample=True, num_return_sequences=G, top_k=0)  # type: ignore[operator]

    tokens = groups * G * bench.tokens
    cfg = bench.config(groups)
    expected = rollout_memory(cfg, shape, prompts[0].input_ids.numel(), image_tokens(policy, prompts[0]), images=0)
    result: dict[str, Any] = {"peak_bytes": bench.peak(ours), "tokens_per_s": tokens / bench.seconds(ours)}
    result["estimated_bytes"] = sum(expected.values()) - PROCESS
    result["generate_tokens_per_s"] = guarded(lambda: tokens / bench.seconds(theirs, repeats=1))
    return result, made


def learn(
    bench: Bench, policy: Policy, shape: ModelShape, prompts: list[EncodedPrompt], made: list[GroupOutput]
) -> dict[str, Any]:
    """An on-policy update over what was sampled."""
    cfg = bench.config(len(made))
    (sample,) = qwen_3b.samples(1, **bench.picture)
    groups = [
        RolloutGroup(sample, prompt, output.completions, 1, SamplingParams(), vision=output.vision)
        for prompt, output in zip(prompts, made, strict=True)
    ]
    for parameter in policy.model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    learner = LearnerStep(policy, cfg.learner)
    plan = qwen_3b.plan_of(groups, cfg.learner, policy_version=1)
    metrics: dict[str, Any] = {}

    def step() -> None:
        told = learner.run(plan, lambda planned: [group.payload for group in planned])
        if not metrics:  # what was sampled is of the policy before the first update
            metrics.update(told)

    peak = bench.peak(lambda: (step(), step()))
    seconds = bench.seconds(step)
    prompt = prompts[0].input_ids.numel()
    tokens = len(groups) * (prompt + G * bench.tokens)
    estimate = learner_memory(cfg, shape, batch_plan(cfg, prompt), prompt, image_tokens(policy, prompts[0]))
    flop = len(groups) * step_flop(policy, shape, prompt, bench.tokens)
    return {
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "flop": flop,
        "flop_per_s": flop / seconds,
        "peak_bytes": peak,
        "estimated_bytes": sum(estimate.values()) - PROCESS,
        "sampler_gap_max": metrics.get("sampler_gap/max"),
        "sampler_gap_mean": metrics.get("sampler_gap/mean"),
        "grad_norm": metrics["grad_norm"],
        "seconds_by_phase": {k: v for k, v in metrics.items() if k.startswith("seconds/")},
    }


def step_flop(policy: Policy, shape: ModelShape, prompt: int, tokens: int) -> float:
    """Of one group's forward and backward pass, each product once: a frozen layer has no gradient of its weights."""
    layers = sum(p.numel() for n, p in policy.decoder.layers.named_parameters() if "lora_" not in n and p.ndim == 2)  # type: ignore[union-attr,operator]
    behind = G * tokens
    products = 4.0 * layers * (prompt + behind) + 6.0 * shape.adapter_parameters * (prompt + behind)
    attention = 12.0 * shape.layers * shape.query_width * (prompt**2 / 2 + behind * (prompt + tokens / 2))
    return products + attention + 4.0 * shape.vocabulary * shape.hidden * behind


def image_tokens(policy: Policy, prompt: EncodedPrompt) -> int:
    """Of the prompt."""
    return int((prompt.input_ids == policy.placeholder_id).sum())


def gemm_peak(bench: Bench) -> float:
    """FLOP a second of one large product in bfloat16."""
    n = 256 if bench.small else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    many = 2 if bench.small else 20
    return 2.0 * n**3 * many / bench.seconds(lambda: [a @ b for _ in range(many)])


def guarded(work: Callable[[], Any]) -> Any:
    """Its result, or what went wrong: one figure less is no reason to lose the others."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is written down
        traceback.print_exc()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def measure(bench: Bench, size: str, note: Callable[[str, Any], None]) -> None:
    """All figures of one size, each told as soon as it is there."""
    for dtype in (torch.bfloat16, torch.float32):
        note(
            f"{size}/parity/{str(dtype).removeprefix('torch.')}",
            guarded(lambda dtype=dtype: parity(bench, size, dtype)),
        )
    policy, shape = bench.policy(size, torch.bfloat16)
    first: list[GroupOutput] = []
    for groups in bench.batches:

        def sampled(groups: int = groups) -> dict[str, Any]:
            figures, made = decode(bench, policy, shape, groups)
            first.extend([] if first else made)
            return figures

        note(f"{size}/decode/{groups}x{G}", guarded(sampled))
    prompts = bench.prompts(policy, bench.batches[0])
    note(f"{size}/learner", guarded(lambda: learn(bench, policy, shape, prompts, first)))


def table(results: dict[str, Any]) -> str:
    """For people."""
    peak = results["peak_flop_per_s"]
    lines = [
        f"{results['device']}, torch {results['torch']}, transformers {results['transformers']}; "
        f"a large product {results['gemm_flop_per_s'] / 1e12:.3f} TFLOP/s"
    ]
    for name, value in results["figures"].items():
        if "error" in value:
            lines.append(f"{name:24} {value['error']}")
        elif "/parity/" in name:
            gaps = ", ".join(f"{g['path']} {g['to_model']:.2g}/{g['to_sampler']:.2g}" for g in value["paths"])
            told = "; ".join(value["troubles"]) or f"{value['path']} within {value['bound']:.2g}"
            lines.append(f"{name:24} sampler {value['sampler_to_generate']:.2g}, {gaps} nats: {told}")
        elif "/decode/" in name:
            theirs = value["generate_tokens_per_s"]
            beside = f"generate {theirs:,.0f}" if isinstance(theirs, float) else theirs["error"]
            lines.append(f"{name:24} {value['tokens_per_s']:,.0f} tokens/s, {beside}; {memory(value)}")
        else:
            lines.append(
                f"{name:24} {value['tokens_per_s']:,.0f} tokens/s, {value['flop_per_s'] / 1e12:.3f} TFLOP/s "
                f"({value['flop_per_s'] / peak:.0%} of the peak, "
                f"{value['flop_per_s'] / results['gemm_flop_per_s']:.0%} of a large product); {memory(value)}; "
                f"sampler gap {value['sampler_gap_max']:.2g} at most, "
                f"{value['sampler_gap_mean']:.2g} on average"
            )
    return "\n".join(lines)


def memory(value: dict[str, Any]) -> str:
    """Peak and estimate."""
    estimate = f"estimated {value['estimated_bytes'] / GIB:.2f} GiB"
    if not value["peak_bytes"]:
        return estimate
    off = value["estimated_bytes"] / value["peak_bytes"] - 1
    return f"peak {value['peak_bytes'] / GIB:.2f} GiB, {estimate} ({off:+.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.device, given.small)
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    gemm = gemm_peak(bench)
    results: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gemm_flop_per_s": gemm,
        "peak_flop_per_s": next((peak for key, peak in PEAKS.items() if key in name), gemm),
        "figures": {},
    }
    began = time.monotonic()

    def note(name: str, value: Any) -> None:
        """Written at once: whoever ends this early keeps what there is."""
        results["figures"][name] = value
        results["seconds"] = time.monotonic() - began
        (given.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (given.out / "table.txt").write_text(table(results) + "\n", encoding="utf-8")
        print(table(results).splitlines()[-1], flush=True)

    for size in bench.sizes:
        measure(bench, size, note)
    print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
