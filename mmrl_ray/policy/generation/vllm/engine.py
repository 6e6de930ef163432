"""The vLLM engine of a rollout worker: prompts go to its process as token ids and pictures, token ids come back.

Completions are drawn from π: vLLM's `processed_logprobs` are those after temperature and forbidden tokens, and it is
given no filters. The G completions of a prompt share its keys by vLLM's prefix cache.

What travels of a picture, where vLLM's model takes it (`EMBEDDED`) and the tower is frozen, is what this process's own
tower makes of it, once for sampling and for whoever scores: vLLM has then no tower at all. A wrong shape would end its
engine, so shapes are checked here. Elsewhere pictures travel as RGB, by the one decoder of this project; vLLM's own
processor makes pixels of them, once a picture as long as its cache holds it. Pixels cannot travel: vLLM takes them from
its own processors alone, each of which counts a picture's tokens by the picture's size.

A version of the weights is an adapter that never was a file. Each has an id, a name and a cache salt of its own: vLLM
would take what its prefix cache has of an earlier version of the same name for the later one's.

Where a greedy completion is asked for at a temperature other than 1, its log-probs are those at temperature 1: vLLM
applies none where it does not draw (`Capabilities.greedy_logprobs`).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NoReturn

import numpy as np
import torch
from peft import PeftModel
from transformers.utils import is_torchvision_available

from mmrl_ray.config.learner import EngineSection
from mmrl_ray.data.images import decode_image
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import (
    AdapterError,
    ConfigError,
    ContextLengthError,
    MMRLError,
    ModelError,
    ProcessError,
    last_line,
)
from mmrl_ray.experience.carriers import Completion, EncodedPrompt, SamplingParams, VisionFeatures
from mmrl_ray.policy.generation.base import Capabilities, DecodeRequest, GenerationEngine, GroupOutput
from mmrl_ray.policy.generation.vllm.child import EXTENSION, pack, unpack
from mmrl_ray.policy.generation.vllm.environment import program
from mmrl_ray.policy.heads import split_heads
from mmrl_ray.policy.lora.adapter import adapter_state
from mmrl_ray.policy.lora.targets import check_tensor_names
from mmrl_ray.policy.memory import CACHE_BLOCK, LORA_PLACES, EngineLimits, padded_rank
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import with_source
from mmrl_ray.policy.vision import VisionCache, give_back, vision_features
from mmrl_ray.processes import ChildProcess, Lost

NAME = "the vLLM engine"
_TAIL_BYTES = 4096
EMBEDDED = ("llava", "qwen2_vl", "qwen2_5_vl")
"""Model types whose pictures vLLM takes as what a tower has made of them; by trial, tokens and log-probs stay. Those
for LLaVA-NeXT, InternVL and Qwen3-VL have a place for them, and end: where pictures differ in size, or at once."""
_SEEDS = 1 << 62
"""vLLM adds a completion's place to the seed, and takes 63 bits."""
_ERRORS = {error.__name__: error for error in (ConfigError, AdapterError)}


class VllmProcess:
    """vLLM's engine in a process of its own; one thread at a time. Every wait has a deadline, at which it is ended."""

    def __init__(
        self, python: str | None, asked: Mapping[str, Any], *, environment: Mapping[str, str], start_timeout_s: float
    ) -> None:
        """Starts it, and waits until the model is loaded.

        Args:
            python: an interpreter that has vLLM, see `environment.program`.
            asked: what `child.Engine` takes.
            environment: variables beside this process's own.
            start_timeout_s: for loading the model, and compiling it where it is compiled.

        Raises:
            ConfigError: there is no such interpreter, it has no vLLM, or vLLM has no such argument.
            ProcessError: vLLM does not start; with the end of what it wrote.
        """
        self._output = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - as long as this
        self._told, self._is_open = 0, True
        self._child = ChildProcess(
            "mmrl_ray.policy.generation.vllm.child:work",
            NAME,
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", **environment},
            python=program(python),
            output=self._output.fileno(),
        )
        try:
            self.facts = self._asked(dict(asked), None, start_timeout_s)[0]
            """`child.Engine.facts`."""
        except MMRLError:
            self.close()
            raise

    def ask(
        self, what: str, *, timeout_s: float, tensors: Mapping[str, torch.Tensor] | None = None, **message: Any
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The answer to one request of `child.py`.

        Raises:
            ProcessError: the engine is gone, or gave no answer in time and has been ended.
            AdapterError: the adapter does not fit.
        """
        return self._asked({"ask": what, **message}, tensors, timeout_s)

    def close(self) -> None:
        """Ends it."""
        self._is_open = False
        self._child.end()
        self._relay()

    def _asked(
        self, message: dict[str, Any], tensors: Mapping[str, torch.Tensor] | None, timeout_s: float
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        if not self._is_open:
            raise ProcessError(f"{NAME} is not running any more{self._tail()}")
        frame = self._child.ask(pack(message, tensors), timeout_s=timeout_s)
        if isinstance(frame, Lost):
            self._is_open = False
            raise ProcessError(f"{frame.reason}{self._tail()}")
        answer, found = unpack(frame)
        if "error" in answer:
            self._refused(answer["kind"], answer["error"])
        self._relay()
        return answer, found

    def _refused(self, kind: str, error: str) -> NoReturn:
        remedy = "; `mmrl engine install vllm` makes an environment" if "no usable vLLM" in error else ""
        raise _ERRORS.get(kind, ProcessError)(f"{NAME}: {error}{remedy}")

    def _written(self) -> str:
        """What it has written since the last look."""
        found = self._read(self._told)
        self._told += len(found)
        return found.decode(errors="replace")

    def _read(self, start: int) -> bytes:
        """Of what it has written, from there on. At a place of its own: that of the open file is the process's, too."""
        end = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), max(0, end - start), start)

    def _relay(self) -> None:
        """Hands on what it wrote, to where this process's own messages go."""
        if text := self._written():
            sys.stderr.write(text)

    def _tail(self) -> str:
        """The end of what it wrote, for an error."""
        end = os.fstat(self._output.fileno()).st_size
        said = last_line(self._read(max(0, end - _TAIL_BYTES)).decode(errors="replace"))
        self._relay()
        return f"; the last that it wrote: {said}" if said else ""


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
    """
    embeds = cfg.args.get("enable_mm_embeds", embeds)
    if embeds and (reason := no_features(policy)) is not None:
        if "enable_mm_embeds" in cfg.args:
            raise ConfigError(f"rollout.engine.args.enable_mm_embeds: {reason}; leave it out")
        embeds = False
    dtype = str(policy.dtype).removeprefix("torch.")
    rank = _adapter_config(policy)["r"]
    args = {
        "dtype": dtype,
        # What a picture is made into is kept as long as its features are here; those themselves are not kept twice.
        "mm_processor_cache_gb": 0.0 if embeds else cache.budget_bytes / (1 << 30),
        **(_on_cpu(policy, cfg, rows) if policy.device.type == "cpu" else {}),
        "max_loras": LORA_PLACES,
        **({"enable_sleep_mode": True} if takes_turns else {}),
        **cfg.arguments,
        "model": policy.path,
        "revision": revision,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_lora": True,
        "max_lora_rank": padded_rank(rank),
        "worker_extension_cls": f"{EXTENSION}.Adapters",
        "enable_mm_embeds": embeds,
        # Without pictures there is no tower, and no room that is kept for one.
        "limit_mm_per_prompt": {"video": 0, **({"image": 0} if embeds else {})},
        "mm_processor_kwargs": policy.processor_settings or None,
        "disable_log_stats": False,
    }
    process = VllmProcess(
        cfg.python,
        {"args": args, "forbidden": list(policy.image_token_ids), "ends": list(policy.eos_token_ids)},
        environment={
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            # Pictures are to be made as this process makes them.
            "MMRL_VLLM_PILLOW": "" if is_torchvision_available() else "1",
        },
        start_timeout_s=cfg.start_timeout_s,
    )
    exact = args["dtype"] == dtype and cfg.quantization is None and args.get("kv_cache_dtype", "auto") == "auto"
    return VllmEngine(policy, process, cache, timeout_s=timeout_s, exact=exact)


def _on_cpu(policy: Policy, cfg: EngineSection, rows: int) -> dict[str, Any]:
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

        `cache` is the scorer's; `exact` says that vLLM computes in the policy's dtype, without quantisation.
        """
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
        adapter, _ = split_heads(self._as_made if weights is None else weights)  # heads have no part in sampling
        before, self._version = self._version, None
        check_tensor_names(self._as_made.keys(), adapter.keys())
        for name, tensor in adapter.items():  # vLLM copies what is too small into a part of its place
            if tensor.shape != self._as_made[name].shape:
                raise AdapterError(
                    f"version {version}: adapter weight {name} has shape {list(tensor.shape)}, this policy's "
                    f"{list(self._as_made[name].shape)}"
                )
        # An adapter that changes nothing is none: the base is the same policy, and faster.
        is_base = all(not bool(tensor.any()) for name, tensor in adapter.items() if ".lora_B." in name)
        config, tensors = (None, {}) if is_base else (self._config, dict(adapter))
        self._process.ask("load", version=version, adapter=config, tensors=tensors, timeout_s=self._timeout_s)
        if before is not None and before != version:
            self._process.ask("drop", version=before, timeout_s=self._timeout_s)
        self._version = version

    def prepared(self, prompt: EncodedPrompt, sample: Sample) -> EncodedPrompt:
        """With its pictures, and its tokens before the processor took them."""
        return with_source(self._policy, prompt, sample)

    def give_back(self) -> None:
        """Features that the scorer made; and vLLM sleeps, where it can: weights go to the CPU, its cache is gone."""
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
        if self._process.facts["can_sleep"]:
            self._process.ask("wake", timeout_s=self._timeout_s)
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


def takes_embeddings(policy: Policy) -> bool:
    """Whether vLLM's model of this kind takes what a tower has made, of whatever weights."""
    config = policy.hf_model.config
    return config.model_type in EMBEDDED and getattr(config.vision_config, "model_type", "") != "pixtral"


def no_features(policy: Policy) -> str | None:
    """Why vLLM has to look at the policy's pictures by a tower of its own, or None."""
    if not takes_embeddings(policy):
        return f"vLLM's model for {policy.hf_model.config.model_type} takes nothing but pictures"
    if policy.vision_trainable:
        return "the adapter is on what comes before the language model, so that features change with each version"
    return None if policy.inject_vision else "ready-made vision features change this model's log-probs"


def embeddings(policy: Policy, request: DecodeRequest, features: VisionFeatures) -> dict[str, torch.Tensor]:
    """What vLLM takes of a request's pictures in their stead, on the CPU.

    `image_embeds` [image tokens, d] in the policy's dtype, `sizes` int64 [pictures], the tokens of each, and
    `image_grid_thw` int64 [pictures, 3] where a model has it.

    Raises:
        ModelError: they are not what the prompt has placeholders for; vLLM's engine would end.
    """
    prompt, source = request.prompt, request.prompt.source
    if source is None:
        raise ModelError("a prompt came to the vLLM engine without its pictures (GenerationEngine.prepared)")
    # Neighbours share a run of placeholders: where one ends and the next begins makes no difference to the model.
    runs, pictures = _runs(policy, prompt.input_ids), _runs(policy, source.token_ids)
    sizes = [
        part.numel()
        for run, count in zip(runs, pictures, strict=False)
        for part in torch.empty(run).tensor_split(count)
    ]
    wanted, found = [sum(runs), policy.hidden_size], list(features.tokens.shape)
    grid = prompt.model_inputs.get("image_grid_thw")
    merged = [] if grid is None else (grid.prod(-1) // _merge_size(policy) ** 2).tolist()
    if found != wanted or len(sizes) != len(source.images) or (grid is not None and merged != sizes):
        raise ModelError(
            f"{found} vision features for a prompt of {len(source.images)} pictures that wants {wanted}, "
            f"{sizes} tokens a picture{'' if grid is None else f' and {merged} by their grids'}: the processor and the "
            "model do not fit together"
        )
    made = {"image_embeds": features.tokens.to(policy.dtype).cpu(), "sizes": torch.tensor(sizes)}
    return made if grid is None else {**made, "image_grid_thw": grid}


def _runs(policy: Policy, ids: torch.Tensor) -> list[int]:
    """Lengths of the stretches of placeholders."""
    return [sum(1 for _ in run) for is_place, run in groupby((ids == policy.placeholder_id).tolist()) if is_place]


def _merge_size(policy: Policy) -> int:
    return int(policy.hf_model.config.vision_config.spatial_merge_size)


def submit(
    process: VllmProcess,
    version: int | None,
    requests: Sequence[DecodeRequest],
    made: Sequence[Mapping[str, torch.Tensor]] | None = None,
    *,
    timeout_s: float,
) -> list[str]:
    """Hands groups to the engine, to be sampled by a version that was loaded; tickets for `collect`.

    `made` has `embeddings` of each, for an engine without a tower; otherwise their pictures are decoded and sent.

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
                f"room of {room}: raise rollout.engine.max_model_len"
            )
        if made is None:
            for i, image in enumerate(source.images):
                tensors[f"{place}/image/{i}"] = torch.from_numpy(np.array(decode_image(image)))
        else:
            tensors.update({f"{place}/{name}": tensor.clone() for name, tensor in made[place].items()})
        tensors[f"{place}/ids"] = source.token_ids.clone()  # a prompt may come twice
        prompt = {"prompt": place, "images": len(source.images), "image_key": request.prompt.image_key}
        for n, greedy in ((request.n, request.sampling.greedy), (1, True))[: 1 + request.greedy_extra]:
            groups.append({"version": version, **prompt, "sampling": _sampling(request.sampling, n, greedy=greedy)})
    answer, _ = process.ask("submit", groups=groups, tensors=tensors, timeout_s=timeout_s)
    return list(answer["tickets"])


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
        Completion(
            ids.clone(),
            probs.clone(),
            str(policy.tokenizer.decode(ids.tolist(), skip_special_tokens=True)),
            "stop" if finish == "stop" else "length",
        )
        for ids, probs, finish in zip(
            tokens.split(group["lengths"]), logprobs.split(group["lengths"]), group["finish"], strict=True
        )
    ]


def _sampling(asked: SamplingParams, n: int, *, greedy: bool) -> dict[str, Any]:
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
    """What vLLM reads of PEFT's: rank and scaling."""
    assert isinstance(policy.model, PeftModel)
    config: Any = policy.model.peft_config[policy.model.active_adapter]
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": bool(config.use_rslora),
        "target_modules": sorted(config.target_modules or ()),
        "bias": "none",
    }
