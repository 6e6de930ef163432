"""What `mmrl export` writes, in plain vLLM: no extension, no patches, nothing of this project in the process."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from mmrl_ray.config import Config
from mmrl_ray.config.load import dump_config
from mmrl_ray.config.sections import LoraSection, ModelSection
from mmrl_ray.data.samples import write_parquet
from mmrl_ray.export.export import export
from mmrl_ray.learner.checkpoints import save_adapter_folder
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import add_adapter, load_adapter_state
from mmrl_ray.policy.memory import CACHE_BLOCK
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.tokens import load_processor
from mmrl_ray.run_records.run_dir import RunDir
from tests.support.tiny_models import make_samples
from tests.vllm.models import RANK, adapter_of, policy_of

TOKENS = 12
PLAIN = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

asked = json.load(sys.stdin)
engine = LLM(asked["model"], **asked["args"])
bias = {token: -1e9 for token in asked["forbidden"]}
sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], logit_bias=bias, logprobs=1)
prompts = [{"prompt": p["text"], "multi_modal_data": {"image": Image.open(p["image"])}} for p in asked["prompts"]]
for lora in (None, LoRARequest("adapter", 1, asked["adapter"])):
    outputs = engine.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
    made = [output.outputs[0] for output in outputs]
    print("SAID", json.dumps([[[t, p[t].logprob] for t, p in zip(m.token_ids, m.logprobs)] for m in made]))
"""
BOUND = 1e-3
"""Nats, in float32."""
SIZES = {"llava": ((24, 24), (24, 24), (24, 24)), "qwen2_5_vl": ((56, 56), (84, 56), (56, 112))}
"""Pictures as the model sees them: vLLM resizes others by torchvision, transformers here by Pillow."""
Saying = list[tuple[int, float]]
"""Greedy tokens with their log-probs."""


def agree(found: Saying, tokens: list[int], logits: tuple[torch.Tensor, ...]) -> int:
    """Holds what vLLM said against transformers' own greedy tokens and logits, as far as they are the same.

    Returns the number of log-probs that were compared.
    """
    for i, ((token, logprob), own, scores) in enumerate(zip(found, tokens, logits, strict=False)):
        of_token, of_own = (float(scores[0].log_softmax(-1)[each]) for each in (token, own))
        assert abs(logprob - of_token) < BOUND
        if token != own:  # as good
            assert of_own - of_token < BOUND
            return i + 1
    return min(len(found), len(tokens))


def run_with(policy: Policy, name: str, root: Path) -> RunDir:
    """A finished run whose policy it is."""
    held_out = root / "held-out"
    if not held_out.exists():
        write_parquet(held_out, make_samples())
    cfg = Config.model_validate(
        {
            "run": {"name": name, "root": str(root / "runs")},
            "model": {"path": policy.path, "dtype": "float32", "lora": {"r": RANK, "alpha": 8.0}},
            "data": {"train": str(held_out), "eval": str(held_out)},
            "rollout": {"max_new_tokens": TOKENS},
            "learner": {"steps": 1},
        }
    )
    run = RunDir.create(cfg.run.root, name)
    run.write_text("config.yaml", dump_config(cfg))
    save_adapter_folder(run, "adapter", policy, 1)
    return run


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_merged_model_and_an_adapter_on_it_say_in_plain_vllm_what_they_say_in_transformers(
    family: str, python: str, tmp_path: Path
) -> None:
    first = policy_of(family, tmp_path / "base")
    load_adapter_state(first.model, adapter_of(first, 1) or {})
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    export(run_with(first, "first", tmp_path).location, merged, merged=True)
    second = load_policy(ModelSection(path=str(merged), dtype="float32"), device="cpu")
    add_adapter(second, LoraSection(r=RANK, alpha=8.0), seed=0)
    load_adapter_state(second.model, adapter_of(second, 2) or {})
    export(run_with(second, "second", tmp_path).location, adapter)

    plain = AutoModelForImageTextToText.from_pretrained(merged).eval()
    processor = load_processor(str(merged), AutoConfig.from_pretrained(merged))
    forbidden = list(first.image_token_ids)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=TOKENS, suppress_tokens=forbidden)
    prompts, inputs = [], []
    for i, sample in enumerate(make_samples(SIZES[family])):
        picture, file = Image.open(io.BytesIO(sample.images[0])), tmp_path / f"{i}.png"
        picture.save(file)
        content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompts.append({"text": text, "image": str(file)})
        inputs.append(processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False))

    @torch.no_grad()
    def said_by(model: Any) -> list[tuple[list[int], tuple[torch.Tensor, ...]]]:
        made = [
            model.generate(**each, generation_config=greedy, return_dict_in_generate=True, output_logits=True)
            for each in inputs
        ]
        return [
            (m.sequences[0, each["input_ids"].shape[1] :].tolist(), m.logits)
            for m, each in zip(made, inputs, strict=True)
        ]

    expected = [said_by(plain), said_by(PeftModel.from_pretrained(plain, str(adapter)).eval())]
    assert [tokens for tokens, _ in expected[0]] != [tokens for tokens, _ in expected[1]], "the adapter is felt"
    asked = {
        "model": str(merged),
        "adapter": str(adapter),
        "tokens": TOKENS,
        "forbidden": forbidden,
        "prompts": prompts,
        "args": {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "kv_cache_memory_bytes": 1 << 28,
            "block_size": CACHE_BLOCK,
            "max_num_batched_tokens": 1024,
            "enable_lora": True,
            "max_lora_rank": 8,
        },
    }
    done = subprocess.run(
        [python, "-c", PLAIN],
        input=json.dumps(asked),
        env={
            **{**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line.removeprefix("SAID ")) for line in done.stdout.splitlines() if line.startswith("SAID")]
    for said, theirs in zip(found, expected, strict=True):
        compared = [agree(one, *other) for one, other in zip(said, theirs, strict=True)]
        assert sum(compared) > len(compared)
