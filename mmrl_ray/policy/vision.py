"""Vision features once: made by the frozen tower, kept under a byte budget, put into the model's forward.

Features depend on images, processor settings and weights alone (`EncodedPrompt.image_key` names all three). They reach
the model by standing in for its `get_image_features`, which every image-text-to-text forward of transformers calls on
itself; the forward scatters them to the placeholder positions (and Qwen3-VL its deepstack features into the layers).
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.model import Policy, computing
from mmrl_ray.policy.prompts import PER_TOKEN


class VisionCache:
    """Vision features by image key, least recently used out first. Not thread-safe: one a process and decode loop."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[str, VisionFeatures] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> VisionFeatures | None:
        """The features under `key`, counted as a hit, or None, counted as a miss."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return found

    def put(self, key: str, features: VisionFeatures) -> None:
        """Keeps `features`, dropping the least recently used ones; features above the whole budget are not kept."""
        if key in self._entries:
            self.nbytes -= self._entries.pop(key).nbytes
        if features.nbytes > self.budget_bytes:
            return
        while self.nbytes + features.nbytes > self.budget_bytes:
            self.nbytes -= self._entries.popitem(last=False)[1].nbytes
        self._entries[key] = features
        self.nbytes += features.nbytes

    def clear(self) -> None:
        """Drops every entry."""
        self._entries.clear()
        self.nbytes = 0


def give_back(device: torch.device, cache: VisionCache) -> None:
    """Frees what a process keeps on a device between two phases: vision features, and the allocator's free blocks.

    Another process on the same GPU has its turn, and cannot get at them: the peaks of sampling (its keys and values)
    and of learning (activations) would lie side by side.
    """
    cache.clear()
    allocator = torch.get_device_module(device)
    if hasattr(allocator, "empty_cache"):  # the CPU's keeps nothing
        allocator.empty_cache()


def vision_features(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    cache: VisionCache | None = None,
    *,
    trainable: bool | None = None,
) -> list[VisionFeatures]:
    """One `VisionFeatures` a prompt: from the cache, or by as few passes of the vision tower as shapes allow.

    While anything before the language model trains (`policy.vision_trainable`) the cache is left alone and features
    carry a gradient; otherwise they are made without one. Where features cannot stand in for the tower
    (`policy.inject_vision` is False) they are empty, and forwards run the tower on the pixels. `trainable` is
    `policy.vision_trainable` from who knows it, which else is looked for among all parameters.

    Raises:
        ModelError: the tower's tokens do not match the prompt's placeholders.
    """
    if not policy.inject_vision:
        return [VisionFeatures(torch.empty(0, 0, device=policy.device, dtype=policy.dtype)) for _ in prompts]
    if policy.vision_trainable if trainable is None else trainable:
        return _encode(policy, prompts, alone=False)
    found: dict[str, VisionFeatures] = {}
    missing: dict[str, EncodedPrompt] = {}
    for prompt in prompts:
        if prompt.image_key in found or prompt.image_key in missing:
            continue
        known = cache.get(prompt.image_key) if cache is not None else None
        if known is None:
            missing[prompt.image_key] = prompt
        else:
            found[prompt.image_key] = known
    with torch.no_grad():
        made = _encode(policy, list(missing.values()), alone=_alone(policy))
    for key, features in zip(missing, made, strict=True):
        # A slice of a batch would keep (and pickle) the whole batch.
        found[key] = features = VisionFeatures(features.tokens.clone(), tuple(t.clone() for t in features.deepstack))
        if cache is not None:
            cache.put(key, features)
    return [found[prompt.image_key] for prompt in prompts]


def image_inputs(prompts: Sequence[EncodedPrompt]) -> dict[str, torch.Tensor]:
    """The prompts' per-image inputs, concatenated as their processor batches them: along the first axis, others padded
    with 0 where they differ (SmolVLM: samples of fewer tiles, which its tower tells by their zeros).

    MiniCPM-V's pixels go along the last axis, patches of all tiles in one row. Where nothing beside the pixels says
    which tiles are real (PerceptionLM), all tiles stand in one row instead of padded rows: its tower takes them one by
    one.
    """
    names = [name for name in prompts[0].model_inputs if name not in PER_TOKEN]
    inputs = {name: [prompt.model_inputs[name] for prompt in prompts] for name in names}
    pixels = inputs.pop("pixel_values", None)
    made = {name: _concatenated(values) for name, values in inputs.items()}
    if pixels is None:
        return made
    if "target_sizes" in inputs:
        made["pixel_values"] = torch.cat(pixels, dim=-1)
    elif not inputs and pixels[0].ndim == 5 and len({tiles.shape[1] for tiles in pixels}) > 1:
        made["pixel_values"] = torch.cat([tiles.flatten(0, 1) for tiles in pixels])[None]
    else:
        made["pixel_values"] = _concatenated(pixels)
    return made


@contextmanager
def injected(policy: Policy, features: Sequence[VisionFeatures]) -> Iterator[dict[str, Any]]:
    """Within it, the model's forward takes `features` (in batch order) for what its vision tower would make.

    Yields the arguments that the forward needs for that: a placeholder for the pixels.
    """
    device, dtype = policy.device, policy.dtype
    tokens = _Pooled([policy.place(f.tokens).to(dtype) for f in features])
    layers = zip(*(f.deepstack for f in features), strict=True)
    deepstack = [_Pooled([policy.place(t).to(dtype) for t in layer]) for layer in layers]
    core = policy.core
    output = _TowerOutput(tokens, deepstack)
    core.get_image_features = lambda *args, **kwargs: output
    try:
        # LLaVA-NeXT looks for pictures along the first axis.
        yield {"pixel_values": torch.empty(len(features), 0, device=device, dtype=dtype)}
    finally:
        del core.get_image_features  # the class's own method shows again


class _TowerOutput:
    """What a vision tower gives, and None for all else that a forward hands on (Granite-Docling's router)."""

    def __init__(self, tokens: _Pooled, deepstack: Sequence[_Pooled]) -> None:
        self.pooler_output = tokens
        self.deepstack_features = deepstack

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Pooled(list[torch.Tensor]):
    """Per-sample features: some forwards concatenate a list, others use one tensor (`.to`, `.reshape`). It is both."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cat(self), name)


def _concatenated(values: Sequence[torch.Tensor]) -> torch.Tensor:
    largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [(0, want - have) for want, have in zip(largest, value.shape[1:], strict=True)]
        pads = [width for pair in reversed(missing) for width in pair]
        padded.append(torch.nn.functional.pad(value, pads) if any(pads) else value)
    return torch.cat(padded)


def _encode(policy: Policy, prompts: Sequence[EncodedPrompt], *, alone: bool) -> list[VisionFeatures]:
    batches: dict[tuple[Any, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        batches.setdefault((i,) if alone else _shape_key(prompt.model_inputs), []).append(i)
    made: dict[int, VisionFeatures] = {}
    for indices in batches.values():
        batch = [prompts[i] for i in indices]
        made.update(zip(indices, _encode_batch(policy, batch), strict=True))
    return [made[i] for i in range(len(prompts))]


def _alone(policy: Policy) -> bool:
    """On a CPU each sample whose features are kept goes through the tower by itself: they must not depend, in their
    last bits, on what else was missing from the cache, or the same assignment would not give the same completions on
    every worker."""
    return policy.device.type == "cpu"


def _shape_key(inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """Prompts of equal keys can be concatenated along the first axis."""
    return tuple((name, tuple(value.shape[1:])) for name, value in sorted(inputs.items()) if name not in PER_TOKEN)


@computing
def _encode_batch(policy: Policy, prompts: Sequence[EncodedPrompt]) -> list[VisionFeatures]:
    accepted = inspect.signature(policy.core.get_image_features).parameters
    inputs = {name: policy.place(value) for name, value in image_inputs(prompts).items() if name in accepted}
    if "pixel_values" not in inputs:
        raise ModelError("a prompt without pixels has no vision features: they were neither shipped nor kept")
    inputs["pixel_values"] = inputs["pixel_values"].to(policy.dtype)
    output = policy.core.get_image_features(**inputs, return_dict=True)
    counts = [int((prompt.input_ids == policy.placeholder_id).sum()) for prompt in prompts]
    tokens = _split(output.pooler_output, counts)
    deepstack = [_split(layer, counts) for layer in getattr(output, "deepstack_features", None) or ()]
    return [VisionFeatures(t, tuple(layer[i] for layer in deepstack)) for i, t in enumerate(tokens)]


def _split(pooled: Any, counts: Sequence[int]) -> list[torch.Tensor]:
    """Per image or tile [.., tokens, d] to per sample [tokens, d], in placeholder order."""
    parts = pooled if isinstance(pooled, list | tuple) else [pooled]
    flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    if flat.shape[0] != sum(counts):
        raise ModelError(
            f"the vision tower made {flat.shape[0]} tokens for {sum(counts)} placeholders; "
            "the processor and the model do not fit together"
        )
    return list(flat.split(list(counts)))
