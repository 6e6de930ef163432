"""What is asked of a vLLM engine's process for a group, and what comes back: token ids, pictures, completions.

What travels of a picture, where vLLM's model takes it (`EMBEDDED`) and the tower is frozen, is what this process's own
tower makes of it, once for sampling and for whoever scores: vLLM has then no tower at all. A wrong shape would end its
engine, so shapes are checked here. Elsewhere pictures travel as RGB, by the one decoder of this project; vLLM's own
processor makes pixels of them, once a picture as long as its cache holds it. Pixels cannot travel: vLLM takes them from
its own processors alone, each of which counts a picture's tokens by the picture's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from mmrl_ray.data.images import decode_image
from mmrl_ray.errors import AdapterError, ConfigError, ContextLengthError, ModelError
from mmrl_ray.experience.carriers import Completion, EncodedPrompt, PromptSource, SamplingParams, VisionFeatures
from mmrl_ray.policy.generation.base import DecodeRequest, GroupOutput
from mmrl_ray.policy.generation.vllm.process import VllmProcess
from mmrl_ray.policy.heads import split_heads
from mmrl_ray.policy.lora.targets import check_tensor_names
from mmrl_ray.policy.model import Policy

EMBEDDED = ("llava", "qwen2_vl", "qwen2_5_vl")
"""Model types whose pictures vLLM takes as what a tower has made of them; by trial, tokens and log-probs stay. Those
for LLaVA-NeXT, InternVL and Qwen3-VL have a place for them, and end: where pictures differ in size, or at once."""
_SEEDS = 1 << 62
"""vLLM adds a completion's place to the seed, and takes 63 bits."""


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
    prompt, source = request.prompt, source_of(request.prompt)
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
        source, length, room = source_of(request.prompt), request.prompt.input_ids.numel(), process.facts["context"]
        if length + request.sampling.max_new_tokens > room:
            raise ContextLengthError(
                f"prompt of {length} tokens plus max_new_tokens={request.sampling.max_new_tokens} exceeds the engine's "
                f"room of {room}: raise rollout.engine.max_model_len"
            )
        if made is None:
            tensors.update(prompt_tensors(source, place))
        else:
            tensors[f"{place}/ids"] = source.token_ids.clone()
            tensors.update({f"{place}/{name}": tensor.clone() for name, tensor in made[place].items()})
        prompt = {"prompt": place, "images": len(source.images), "image_key": request.prompt.image_key}
        for n, greedy in parts_of(request):
            groups.append({"version": version, **prompt, "sampling": sampling_of(request.sampling, n, greedy=greedy)})
    answer, _ = process.ask("submit", groups=groups, tensors=tensors, timeout_s=timeout_s)
    return list(answer["tickets"])


def source_of(prompt: EncodedPrompt) -> PromptSource:
    """What a prompt is made of; a ModelError where nobody has put it there."""
    if prompt.source is None:
        raise ModelError("a prompt came to the vLLM engine without its pictures (GenerationEngine.prepared)")
    return prompt.source


def parts_of(request: DecodeRequest) -> list[tuple[int, bool]]:
    """What vLLM is asked for one by one: how many completions, and whether the likeliest ones."""
    samples = (request.n, request.sampling.greedy)
    return [samples, (1, True)] if request.greedy_extra else [samples]


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
        **drawing_of(asked, greedy=greedy),
        "n": n,
        "min_tokens": asked.min_new_tokens or 0,
        "seed": asked.seed % _SEEDS,
    }


def drawing_of(asked: SamplingParams, *, greedy: bool) -> dict[str, Any]:
    """vLLM's parameters for how a token is drawn, and for how many at most."""
    return {
        "temperature": 0.0 if greedy else asked.temperature,
        "max_tokens": asked.max_new_tokens,
        "top_k": 0 if greedy else asked.top_k,
        "top_p": 1.0 if greedy else asked.top_p,
    }
