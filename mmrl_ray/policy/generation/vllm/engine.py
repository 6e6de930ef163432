"""The vLLM engine of a rollout worker: prompts go to its process as token ids and pictures, token ids come back.

Completions are drawn from π: vLLM's `processed_logprobs` are those after temperature and forbidden tokens, and it is
given no filters. Pictures are decoded here, by the one decoder of this project, and travel as RGB; vLLM's own processor
makes pixels of them, once a picture as long as its cache holds it. The G completions of a prompt share its keys by
vLLM's prefix cache.

A version of the weights is an adapter that never was a file. Each has an id, a name and a cache salt of its own: vLLM
would take what its prefix cache has of an earlier version of the same name for the later one's.

Where a greedy completion is asked for at a temperature other than 1, its log-probs are those at temperature 1: vLLM
applies none where it does not draw.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers.utils import is_torchvision_available

from mmrl_ray.config.learner import EngineSection
from mmrl_ray.data.images import decode_image
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import AdapterError, ConfigError, ContextLengthError, ModelError
from mmrl_ray.experience.carriers import Completion, EncodedPrompt, PromptSource, SamplingParams
from mmrl_ray.policy.generation.base import Capabilities, DecodeRequest, GenerationEngine, GroupOutput
from mmrl_ray.policy.generation.vllm.child import EXTENSION
from mmrl_ray.policy.generation.vllm.process import VllmProcess
from mmrl_ray.policy.heads import split_heads
from mmrl_ray.policy.lora.adapter import adapter_state
from mmrl_ray.policy.lora.targets import check_tensor_names
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import with_source
from mmrl_ray.policy.vision import VisionCache, give_back
from mmrl_ray.processes import without_growing_segments

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM has buffers for."""
_SEEDS = 1 << 62
"""vLLM adds a completion's place to the seed, and takes 63 bits."""


def start_engine(
    policy: Policy,
    cfg: EngineSection,
    cache: VisionCache,
    *,
    revision: str | None,
    threads: int,
    timeout_s: float,
    takes_turns: bool = False,
) -> VllmEngine:
    """The engine of a worker whose policy has its adapter, in a process that has loaded the same model.

    Args:
        policy: the worker's.
        cfg: how vLLM is run.
        cache: of the features that the scorer makes.
        revision: of a model that is a hub id.
        threads: of the process, where it computes on CPUs.
        timeout_s: for each of its answers.
        takes_turns: a learner uses the same GPU while it does not sample, so that it has to be able to sleep.

    Raises:
        ConfigError, ProcessError: of `VllmProcess`.
    """
    args = {
        "max_loras": 2,  # the one that samples, and the next
        **({"enable_sleep_mode": True} if takes_turns else {}),
    }
    process = start_process(
        policy,
        cfg,
        args,
        max_rank=_adapter_config(policy)["r"],
        revision=revision,
        threads=threads,
        timeout_s=timeout_s,
    )
    dtype = str(policy.dtype).removeprefix("torch.")
    found = {"dtype": dtype, **cfg.arguments}
    exact = found["dtype"] == dtype and cfg.quantization is None and found.get("kv_cache_dtype", "auto") == "auto"
    return VllmEngine(policy, process, cache, timeout_s=timeout_s, exact=exact)


def start_process(
    policy: Policy,
    cfg: EngineSection,
    args: Mapping[str, Any],
    *,
    max_rank: int | None,
    revision: str | None,
    threads: int,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> VllmProcess:
    """A process that has loaded a policy's model.

    Args:
        policy: tokens that end a completion, tokens that are never sampled, dtype and processor are its own.
        cfg: how vLLM is run.
        args: vLLM's arguments by default, for those that `cfg` leaves out.
        max_rank: of adapters; None where there are none.
        revision: of a model that is a hub id.
        threads: of the process, where it computes on CPUs.
        timeout_s: for each of its answers.
        environment: further variables that it has.

    Raises:
        ConfigError, ProcessError: of `VllmProcess`.
    """
    parts = cfg.tensor_parallel_size or 1
    rank = None if max_rank is None else next((each for each in RANKS if each >= max_rank), max_rank)
    asked = {
        "dtype": str(policy.dtype).removeprefix("torch."),
        **args,
        **({"distributed_executor_backend": "mp"} if parts > 1 else {}),  # not a Ray's that vLLM may find
        **cfg.arguments,
        "model": policy.path,
        "revision": revision,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        **({} if rank is None else {"enable_lora": True, "max_lora_rank": rank}),
        "worker_extension_cls": f"{EXTENSION}.Adapters",
        "limit_mm_per_prompt": {"video": 0},
        "mm_processor_kwargs": policy.processor_settings or None,
        "disable_log_stats": False,
    }
    return VllmProcess(
        cfg.python,
        {"args": asked, "forbidden": list(policy.image_token_ids), "ends": list(policy.eos_token_ids)},
        environment={
            "OMP_NUM_THREADS": str(max(1, threads // parts)),
            **without_growing_segments(),
            # Of a part that fails alone vLLM hears nothing, and waits. It is to find that out before the pool does,
            # which could not say what it was.
            **({"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(max(1, int(timeout_s / 2)))} if parts > 1 else {}),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            # Pictures are to be made as this process makes them.
            "MMRL_VLLM_PILLOW": "" if is_torchvision_available() else "1",
            **(environment or {}),
        },
        start_timeout_s=cfg.start_timeout_s,
    )


class VllmEngine(GenerationEngine):
    """Samples by vLLM; see the file's head."""

    name = "vLLM"

    def __init__(
        self, policy: Policy, process: VllmProcess, cache: VisionCache, *, timeout_s: float, exact: bool = True
    ) -> None:
        """Takes the policy's tokenizer and the adapter that it has now, which is "the adapter as it was made".

        `cache` is the scorer's; `exact` says that vLLM computes in the policy's dtype, without quantisation.
        """
        self.capabilities = Capabilities(  # type: ignore[misc]  # of this one
            value_guided=False, greedy_extra=True, vision_features=False, exact_logprobs=exact, reproducible=False
        )
        self._policy, self._process, self._cache, self._timeout_s = policy, process, cache, timeout_s
        self._as_made = adapter_state(policy.model)
        self._config = _adapter_config(policy)
        self._version: int | None = None
        self._counted: dict[str, float] = {}

    def load(self, version: int, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Loads the version beside the one before, then drops that."""
        before, self._version = self._version, None
        adapter = loadable(version, weights, self._as_made)
        config, tensors = (None, {}) if adapter is None else (self._config, adapter)
        self._process.ask("load", version=version, adapter=config, tensors=tensors, timeout_s=self._timeout_s)
        if before is not None and before != version:
            self._process.ask("drop", version=before, timeout_s=self._timeout_s)
        self._version = version

    def prepared(self, prompt: EncodedPrompt, sample: Sample) -> EncodedPrompt:
        """With its pictures, and its tokens before the processor took them."""
        return with_source(self._policy, prompt, sample)

    def give_back(self) -> None:
        """Features that the scorer made; and vLLM sleeps, where it can: weights go to the CPU, its cache is gone.

        Whatever it is asked for next wakes it.
        """
        give_back(self._policy.device, self._cache)
        self._process.ask("sleep", timeout_s=self._timeout_s)

    def counters(self) -> dict[str, float]:
        """`child.COUNTERS`, of what vLLM has looked for in its caches and what it has found there."""
        answer, _ = self._process.ask("counters", timeout_s=self._timeout_s)
        before, self._counted = self._counted, dict(answer["counters"])
        return {name: value - before.get(name, 0.0) for name, value in self._counted.items()}

    def close(self) -> None:
        """Ends the process."""
        self._process.close()

    def _generate(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        tickets = submit(self._process, self._version, requests, timeout_s=self._timeout_s)
        return collect(self._policy, self._process, requests, tickets, timeout_s=self._timeout_s)


def loadable(
    version: int, weights: Mapping[str, torch.Tensor] | None, as_made: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """What vLLM is to load as a version of the adapter, without heads, which have no part in sampling.

    Args:
        version: for errors.
        weights: as `GenerationEngine.load` takes them.
        as_made: the adapter as it was made.

    Returns:
        None where it changes nothing: the base is the same policy, and faster.

    Raises:
        AdapterError: they do not fit. vLLM copies what is too small into a part of its place.
    """
    adapter, _ = split_heads(as_made if weights is None else weights)
    check_tensor_names(as_made.keys(), adapter.keys())
    for name, tensor in adapter.items():
        if tensor.shape != as_made[name].shape:
            raise AdapterError(
                f"version {version}: adapter weight {name} has shape {list(tensor.shape)}, this policy's "
                f"{list(as_made[name].shape)}"
            )
    is_base = all(not bool(tensor.any()) for name, tensor in adapter.items() if ".lora_B." in name)
    return None if is_base else dict(adapter)


def submit(
    process: VllmProcess, version: int | None, requests: Sequence[DecodeRequest], *, timeout_s: float
) -> list[str]:
    """Hands groups to the engine, to be sampled by a version that was loaded; tickets for `collect`.

    Raises:
        ConfigError: there are stop strings, which an engine without text cannot find.
        ContextLengthError: a prompt and its completions exceed what the engine has room for.
        ProcessError: the version is not loaded, or the engine is gone.
    """
    groups: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for place, request in enumerate(requests):
        source, length, room = request.prompt.source, request.prompt.input_ids.numel(), process.facts["context"]
        if source is None:
            raise ModelError("a prompt came to the vLLM engine without its pictures (GenerationEngine.prepared)")
        if length + request.sampling.max_new_tokens > room:
            raise ContextLengthError(
                f"prompt of {length} tokens plus max_new_tokens={request.sampling.max_new_tokens} exceeds the engine's "
                f"room of {room}: raise rollout.engine.args.max_model_len"
            )
        tensors.update(prompt_tensors(source, place))
        prompt = {"prompt": place, "images": len(source.images), "image_key": request.prompt.image_key}
        for n, greedy in ((request.n, request.sampling.greedy), (1, True))[: 1 + request.greedy_extra]:
            groups.append({"version": version, **prompt, "sampling": sampling_of(request.sampling, n, greedy=greedy)})
    answer, _ = process.ask("submit", groups=groups, tensors=tensors, timeout_s=timeout_s)
    return list(answer["tickets"])


def prompt_tensors(source: PromptSource, place: int) -> dict[str, torch.Tensor]:
    """A prompt as it travels, under names that no other `place` of the message has."""
    tensors = {f"{place}/ids": source.token_ids.clone()}  # a prompt may come twice, and safetensors shares nothing
    for i, image in enumerate(source.images):
        pixels = torch.from_numpy(np.array(decode_image(image))) if isinstance(image, bytes) else image.clone()
        tensors[f"{place}/image/{i}"] = pixels
    return tensors


def collect(
    policy: Policy,
    process: VllmProcess,
    requests: Sequence[DecodeRequest],
    tickets: Sequence[str],
    *,
    timeout_s: float,
) -> list[GroupOutput]:
    """What became of groups that were handed in, as soon as all are done.

    Raises:
        ModelError: a log-prob is NaN, or the engine's prompt has another length than this project's.
        ProcessError: the engine is gone, or is not done in time and has been ended.
    """
    answer, tensors = process.ask("collect", tickets=list(tickets), timeout_s=timeout_s)
    sampled = iter([_completions(policy, i, group, tensors) for i, group in enumerate(answer["groups"])])
    lengths = iter([group["prompt"] for group in answer["groups"]])
    outputs = []
    for request in requests:
        expected, found = request.prompt.input_ids.numel(), next(lengths)
        if found != expected:
            raise ModelError(
                f"vLLM's processor makes {found} tokens of a prompt that has {expected} here: its transformers and "
                "this one read the model's processor differently; use the local engine"
            )
        completions = next(sampled)
        greedy = next(sampled)[0] if request.greedy_extra else None
        if request.greedy_extra:
            next(lengths)
        outputs.append(GroupOutput(tuple(completions), greedy, None))
    return outputs


def _completions(
    policy: Policy, place: int, group: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> list[Completion]:
    tokens, logprobs = tensors[f"{place}/tokens"], tensors[f"{place}/logprobs"]
    if not bool(torch.isfinite(logprobs).all()):
        raise ModelError("vLLM's log-probs hold NaN or infinity; try model.dtype: float32, or an earlier version")
    return [
        completion_of(policy, ids.clone(), probs.clone(), finish)
        for ids, probs, finish in zip(
            tokens.split(group["lengths"]), logprobs.split(group["lengths"]), group["finish"], strict=True
        )
    ]


def completion_of(policy: Policy, ids: torch.Tensor, logprobs: torch.Tensor, finish: str) -> Completion:
    """What vLLM has sampled: tokens int64 [T], log-probs float32 [T], and its `finish_reason`."""
    text = str(policy.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
    return Completion(ids, logprobs, text, "stop" if finish == "stop" else "length")


def sampling_of(asked: SamplingParams, n: int, *, greedy: bool) -> dict[str, Any]:
    """vLLM's parameters, for `n` completions.

    Raises:
        ConfigError: there are stop strings.
    """
    if asked.stop:
        raise ConfigError("the vLLM engine takes no stop strings: it is given tokens and gives tokens")
    return {
        "n": n,
        "temperature": 0.0 if greedy else asked.temperature,
        "max_tokens": asked.max_new_tokens,
        "min_tokens": asked.min_new_tokens or 0,
        "top_k": 0 if greedy else asked.top_k,
        "top_p": 1.0 if greedy else asked.top_p,
        "seed": asked.seed % _SEEDS,
    }


def _adapter_config(policy: Policy) -> dict[str, Any]:
    assert isinstance(policy.model, PeftModel)
    return read_by_vllm(policy.model.peft_config[policy.model.active_adapter])


def read_by_vllm(config: Any) -> dict[str, Any]:
    """What vLLM reads of a `LoraConfig` of PEFT's: rank and scaling."""
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": bool(config.use_rslora),
        "target_modules": sorted(config.target_modules or ()),
        "bias": "none",
    }
