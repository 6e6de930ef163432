"""The peer of `rl_step.py`: TRL's GRPOTrainer on the same model, images, prompt and sizes.

Runs as a process of its own, so that neither side's threads or caches touch the other. Prints one JSON object:
samples a second over the steps after the warm-up, and the median seconds of a step.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import statistics
import time
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class StepClock(TrainerCallback):
    """Wall time at the end of every optimiser step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="Parquet file with image, prompt and references")
    parser.add_argument("--out", required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--completion", type=int, required=True)
    parser.add_argument("--targets", required=True, help="regular expression over module names")
    parser.add_argument("--kl", type=float, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--no-checkpointing", action="store_true", help="keep activations, which TRL by default does not"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = pq.read_table(args.data).to_pylist()
    references = {row["id"]: row["references"] for row in rows}

    def as_conversation(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}],
            "image": Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"),
            "sample": row["id"],
        }

    def word_overlap(completions: list[Any], sample: list[str], **_: Any) -> list[float]:
        """A cheap reward: what is measured is the trainer."""
        scores = []
        for completion, name in zip(completions, sample, strict=True):
            words = set(re.findall(r"\w+", completion[0]["content"].lower()))
            known = set(re.findall(r"\w+", " ".join(references[name]).lower()))
            scores.append(len(words & known) / max(1, len(known)))
        return scores

    total = args.warmup + args.steps
    clock = StepClock()
    batch = args.images * args.group_size
    trainer = GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32),
        processing_class=AutoProcessor.from_pretrained(args.model),
        reward_funcs=word_overlap,
        train_dataset=Dataset.from_list([as_conversation(row) for row in rows]),
        peft_config=LoraConfig(r=args.rank, lora_alpha=16, target_modules=args.targets),
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=args.out,
            per_device_train_batch_size=batch,
            num_generations=args.group_size,
            max_completion_length=args.completion,
            max_steps=total,
            beta=args.kl,
            learning_rate=1e-4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=not args.no_checkpointing,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        ),
    )
    trainer.train()
    seconds = [b - a for a, b in zip(clock.times[args.warmup - 1 :], clock.times[args.warmup :], strict=False)]
    print(
        json.dumps(
            {
                "samples_per_second": batch * len(seconds) / sum(seconds),
                "seconds_per_step": statistics.median(seconds),
                "steps": len(seconds),
            }
        )
    )


if __name__ == "__main__":
    main()
