"""What the shared prefix saves in each pass, within one process and on one thread, without Ray.

    python benchmarks/shared_prefix.py

The model and sizes of `rl_step.py`: P = 261, C = 24, G = 8, LoRA r = 8, one image for scoring and learning, four for
sampling. The peer is the same work with every completion behind its own copy of the prompt: with the vision features
given, and from pixels as trainers usually do it; for sampling it is Hugging Face's `generate`. CPU seconds of this
thread, so that a busy machine tells the same ratios.

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from rl_step import COMPLETION, GROUP_SIZE, IMAGES, PROMPT, build_inputs

from mmrl_ray.config.sections import LoraSection, ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import add_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.prefix import ScorePath, score_completions
from mmrl_ray.policy.vision import VisionCache, image_inputs, vision_features

REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this thread, median after one warm-up."""
    work()
    taken = []
    for _ in range(REPEATS):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return statistics.median(taken)


def scoring(policy: Policy, prompt: EncodedPrompt, *, backward: bool) -> dict[str, float]:
    """Seconds of one group's log-probs (and gradients), by path."""
    features = vision_features(policy, [prompt])
    generator = torch.Generator().manual_seed(0)
    group = [[torch.randint(10, 1000, (COMPLETION,), generator=generator) for _ in range(GROUP_SIZE)]]

    def work(path: ScorePath, *, given: bool) -> None:
        with torch.set_grad_enabled(backward):
            scores = score_completions(policy, [prompt], features if given else None, group, 1.0, path=path)
            if backward:
                scores.logprobs.sum().backward()

    return {
        "shared": seconds(lambda: work("shared_prefix", given=True)),
        "naive": seconds(lambda: work("naive", given=True)),
        "naive, from pixels": seconds(lambda: work("naive", given=False)),
    }


def sampling(policy: Policy, prompts: list[EncodedPrompt]) -> dict[str, float]:
    """Seconds for G completions of each prompt, by decoder."""
    params = SamplingParams(max_new_tokens=COMPLETION, seed=1)
    cache = VisionCache(2**30)

    def decode(*, packed: bool) -> None:
        decode_groups(
            Decoder(policy, vision_cache=cache, packed=packed), [DecodeRequest(p, GROUP_SIZE, params) for p in prompts]
        )

    ids = torch.stack([p.input_ids for p in prompts])

    def generate() -> None:
        policy.model.generate(
            input_ids=ids.repeat_interleave(GROUP_SIZE, 0),
            pixel_values=image_inputs(prompts)["pixel_values"].repeat_interleave(GROUP_SIZE, 0),
            do_sample=True,
            top_k=0,
            max_new_tokens=COMPLETION,
            use_cache=True,
        )

    return {
        "shared": seconds(lambda: decode(packed=True)),
        "a row a completion": seconds(lambda: decode(packed=False)),
        "generate": seconds(generate),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mmrl-bench-") as folder:
        model, data = build_inputs(Path(folder), 1)
        rows = pq.read_table(data).to_pylist()
        policy = load_policy(ModelSection(path=str(model), dtype="float32"), device="cpu")
        add_adapter(policy, LoraSection(r=8, alpha=16), 0)
        samples = [Sample(row["id"], (row["image"]["bytes"],), PROMPT) for row in rows[:IMAGES]]
        prompts = encode_prompts(policy, samples)
        passes = {
            "forward + backward": scoring(policy, prompts[0], backward=True),
            "scoring": scoring(policy, prompts[0], backward=False),
            f"sampling {IMAGES} x {GROUP_SIZE}": sampling(policy, prompts),
        }
    table = Table(title=f"P = {prompts[0].input_ids.numel()}, C = {COMPLETION}, G = {GROUP_SIZE}, one thread")
    for column in ("pass", "path", "CPU seconds", "ratio"):
        table.add_column(column, justify="right" if column in ("CPU seconds", "ratio") else "left")
    for name, paths in passes.items():
        for path, taken in paths.items():
            table.add_row(name, path, f"{taken:.2f}", "" if path == "shared" else f"{taken / paths['shared']:.1f}")
    Console().print(table)
    ratios = {name: paths.get("naive", paths.get("generate", 0.0)) / paths["shared"] for name, paths in passes.items()}
    print(json.dumps({"ratio": ratios["forward + backward"], "ratios": ratios, "seconds": passes}))


if __name__ == "__main__":
    main()
