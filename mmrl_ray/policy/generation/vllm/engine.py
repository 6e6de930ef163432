"""The vLLM engine of a rollout worker: prompts go to its process as token ids and pictures, token ids come back.

Completions are drawn from π: vLLM's `processed_logprobs` are those after temperature and forbidden tokens, and it is
given no filters. The G completions of a prompt share its keys by vLLM's prefix cache. What travels is in `exchange.py`.

A version of the weights is an adapter that never was a file. Each has an id, a name and a cache salt of its own: vLLM
would take what its prefix cache has of an earlier version of the same name for the later one's.

Where a greedy completion is asked for at a temperature other than 1, its log-probs are those at temperature 1: vLLM
applies none where it does not draw (`Capabilities.greedy_logprobs`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from tempfile import gettempdir
from typing import Any

import torch
from peft import PeftModel
from transformers.utils import is_torchvision_available

from mmrl_ray.config.engine import EngineSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import AdapterError, ConfigError, MMRLError, ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.generation.base import Capabilities, DecodeRequest, GenerationEngine, GroupOutput
from mmrl_ray.policy.generation.vllm.child import EXTENSION
from mmrl_ray.policy.generation.vllm.exchange import collect, embeddings, loadable, no_features, submit
from mmrl_ray.policy.generation.vllm.process import VllmProcess
from mmrl_ray.policy.heads import split_heads
from mmrl_ray.policy.lora.adapter import adapter_state
from mmrl_ray.policy.memory import CACHE_BLOCK, LORA_PLACES, EngineLimits, padded_rank
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import with_source
from mmrl_ray.policy.vision import VisionCache, give_back, vision_features
from mmrl_ray.processes import without_growing_segments

_LONGEST_FOLDER = 64
"""Characters of a path that the kernel takes a socket in: 107 with its name, and vLLM's are 37."""


def start_engine(
    policy: Policy,
    cfg: EngineSection,
    cache: VisionCache,
    *,
    revision: str | None,
    threads: int,
    timeout_s: float,
    rows: int = 128,
    takes_turns: bool = False,
    embeds: bool = False,
) -> VllmEngine:
    """The engine of a worker whose policy has its adapter, in a process that has loaded the same model.

    Args:
        policy: the worker's.
        cfg: how vLLM is run.
        cache: of the features that the scorer makes.
        revision: of a model that is a hub id.
        threads: of the process, where it computes on CPUs.
        timeout_s: for each of its answers.
        rows: completions that it is asked for at a time.
        takes_turns: a learner uses the same GPU while it does not sample, so that it has to be able to sleep.
        embeds: pictures go to it as features, where it takes them (`no_features`).

    Raises:
        ConfigError, ProcessError: of `VllmProcess`.
        AdapterError: vLLM cannot have this adapter.
    """
    embeds = cfg.args.get("enable_mm_embeds", embeds)
    if embeds and (reason := no_features(policy)) is not None:
        if "enable_mm_embeds" in cfg.args:
            raise ConfigError(f"rollout.engine.args.enable_mm_embeds: {reason}; leave it out")
        embeds = False
    args = {
        "max_loras": LORA_PLACES,
        **(room_on_cpu(policy, cfg, rows) if policy.device.type == "cpu" else {}),
        # What a picture is made into is kept as long as its features are here; those themselves are not kept twice.
        "mm_processor_cache_gb": 0.0 if embeds else cache.budget_bytes / (1 << 30),
        "enable_mm_embeds": embeds,
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
        # Without pictures there is no tower, and no room that is kept for one.
        has_tower=not embeds,
    )
    dtype = str(policy.dtype).removeprefix("torch.")
    found = {"dtype": dtype, **cfg.arguments}
    exact = found["dtype"] == dtype and cfg.quantization is None and found.get("kv_cache_dtype", "auto") == "auto"
    engine = VllmEngine(policy, process, cache, timeout_s=timeout_s, exact=exact)
    try:
        engine.try_adapter()
    except MMRLError:
        engine.close()
        raise
    return engine


def start_process(
    policy: Policy,
    cfg: EngineSection,
    args: Mapping[str, Any],
    *,
    max_rank: int | None,
    revision: str | None,
    threads: int,
    timeout_s: float,
    has_tower: bool = True,
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
        has_tower: it looks at pictures itself.
        environment: further variables that it has.

    Raises:
        ConfigError, ProcessError: of `VllmProcess`.
    """
    parts = cfg.tensor_parallel_size or 1
    asked = {
        "dtype": str(policy.dtype).removeprefix("torch."),
        **args,
        **({"distributed_executor_backend": "mp"} if parts > 1 else {}),  # not a Ray's that vLLM may find
        **cfg.arguments,
        "model": policy.path,
        "revision": revision,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        **({} if max_rank is None else {"enable_lora": True, "max_lora_rank": padded_rank(max_rank)}),
        "worker_extension_cls": f"{EXTENSION}.Adapters",
        "limit_mm_per_prompt": {"video": 0, **({} if has_tower else {"image": 0})},
        "mm_processor_kwargs": policy.processor_settings or None,
        "disable_log_stats": False,
    }
    return VllmProcess(
        cfg.python,
        {"args": asked, "forbidden": list(policy.image_token_ids), "ends": list(policy.eos_token_ids)},
        environment={
            "OMP_NUM_THREADS": str(max(1, threads // parts)),
            **without_growing_segments(),
            **({"VLLM_RPC_BASE_PATH": "/tmp"} if parts > 1 and len(gettempdir()) > _LONGEST_FOLDER else {}),
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


def room_on_cpu(policy: Policy, cfg: EngineSection, rows: int) -> dict[str, Any]:
    """Arguments where the config has none: by itself vLLM takes nine tenths of a machine's memory for its cache."""
    limits = EngineLimits.on_cpu(
        policy.key_bytes // policy.dtype.itemsize * cfg.itemsize(policy.dtype.itemsize),
        policy.context_length,
        rows=cfg.max_num_seqs or rows,
        tokens=cfg.max_model_len,
    )
    cache = {} if cfg.gpu_memory_utilization is not None else {"kv_cache_memory_bytes": limits.cache_bytes}
    return {"block_size": CACHE_BLOCK, "max_num_seqs": limits.rows, "max_model_len": limits.tokens, **cache}


class VllmEngine(GenerationEngine):
    """Samples by vLLM; see the file's head."""

    name = "vLLM"

    def __init__(
        self, policy: Policy, process: VllmProcess, cache: VisionCache, *, timeout_s: float, exact: bool = True
    ) -> None:
        """Takes the policy's tokenizer and the adapter that it has now, which is "the adapter as it was made".

        The policy is told how much room the engine has for a prompt and its completion. `cache` is the scorer's;
        `exact` says that vLLM computes in the policy's dtype, without quantisation.
        """
        policy.context_length = min(policy.context_length, int(process.facts["context"]))
        self._embeds = bool(process.facts["embeds"])
        self.capabilities = Capabilities(  # type: ignore[misc]  # of this one
            value_guided=False,
            greedy_extra=True,
            vision_features=self._embeds,
            exact_logprobs=exact,
            reproducible=False,
            greedy_logprobs=False,
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

    def try_adapter(self) -> None:
        """Loads the adapter as it was made, and drops it: a fresh one is none (`loadable`), and a later one too late.

        Raises:
            AdapterError: vLLM cannot have it, such as one on a layer that vLLM adapts none of.
        """
        tensors, _ = split_heads(self._as_made)
        try:
            self._process.ask("load", version="trial", adapter=self._config, tensors=tensors, timeout_s=self._timeout_s)
        except AdapterError as error:
            raise AdapterError(
                f"{error}; take such layers out of model.lora.targets, or use the local engine (rollout.engine.kind)"
            ) from error
        self._process.ask("drop", version="trial", timeout_s=self._timeout_s)

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
        features = self.features(requests)
        tickets = submit(
            self._process,
            self._version,
            requests,
            None
            if features is None
            else [embeddings(self._policy, *each) for each in zip(requests, features, strict=True)],
            timeout_s=self._timeout_s,
        )
        outputs = collect(self._policy, self._process, requests, tickets, timeout_s=self._timeout_s)
        if features is None:
            return outputs
        return [replace(output, vision=each) for output, each in zip(outputs, features, strict=True)]

    def features(self, requests: Sequence[DecodeRequest]) -> list[VisionFeatures] | None:
        """What this process's tower makes of each request's pictures; None where vLLM has a tower of its own.

        Raises:
            ModelError: they cannot stand in for a tower, by the comparison at start.
        """
        if not self._embeds:
            return None
        if not self._policy.inject_vision:
            raise ModelError(
                f"model {self._policy.path!r} gives other log-probs by ready-made vision features, which the vLLM "
                "engine is given: set rollout.engine.args.enable_mm_embeds=false"
            )
        missing = [request.prompt for request in requests if request.features is None]
        made = iter(vision_features(self._policy, missing, self._cache))
        return [next(made) if request.features is None else request.features for request in requests]


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
