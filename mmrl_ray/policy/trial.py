"""One trial at the start: does this checkpoint work at all, here, before a worker or a sample is blamed for it?

A tiny picture goes the way of every sample, once: chat template, processor, vision tower, two tokens by the sampler,
their log-probs by the learner's plainest path. What the numbers are worth is not asked here (`parity.py` does, on real
prompts); that none of it raises is.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmrl_ray.config.model import ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, DataError, MMRLError, ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams
from mmrl_ray.policy.boundary import brief
from mmrl_ray.policy.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.load import Policy, load_policy
from mmrl_ray.policy.prefix import score_completions
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.teacher_forced import generated_logprobs
from mmrl_ray.policy.tokens import refuse_unknown_token
from mmrl_ray.policy.weights import weight_files

QUICK_BYTES = 1 << 30
"""Weights up to this size are loaded for a trial before anything else is started."""
_SIZE = (64, 48)
_ROWS = 2
_SAMPLING = SamplingParams(max_new_tokens=2, seed=0)
_passed: dict[tuple[str, ...], bool] = {}
"""Checkpoints that came through in this process, and whether ready-made vision features can be used: the same files in
the same precision need no second trial."""


def try_policy(policy: Policy) -> None:
    """Sends a tiny picture through all of `policy`: a prompt, two tokens for each of two rows, their log-probs.

    Where only ready-made vision features are in the way, `policy.inject_vision` is switched off.

    Raises:
        ModelError: as `try_prompt`; or a forward fails, or the model's logits are NaN: the message says whether
            transformers' own `generate` fails too, so that the checkpoint is to blame, or the family is not supported.
        ConfigError: as `try_prompt`.
    """
    attention = str(policy.hf_model.config._attn_implementation)
    key = (policy.revision_key, policy.path, str(policy.dtype), policy.device.type, attention)
    if key not in _passed:
        _passed[key] = _forward(policy, try_prompt(policy))
    policy.inject_vision = _passed[key]


def try_quickly(cfg: ModelSection) -> bool:
    """Loads the model on the CPU and tries it where that is soon done: its weights lie in a folder and are few.

    Returns:
        whether it was tried.

    Raises:
        ModelError, ConfigError: as `load_policy`.
    """
    folder = Path(cfg.path).expanduser()
    if not folder.is_dir() or cfg.attn_implementation == "flash_attention_2":
        return False
    if sum(file.stat().st_size for file in weight_files(folder, cfg.path)) > QUICK_BYTES:
        return False
    load_policy(cfg.model_copy(update={"dtype": "float32"}), device="cpu")
    return True


def try_prompt(policy: Policy) -> EncodedPrompt:
    """Makes a prompt of a tiny picture and a few words; needs no weights.

    Raises:
        ModelError: the chat template or the processor fails on them, or gives the picture no place.
        ConfigError: a key or a value of `model.processor` is to blame.
    """
    settings = policy.processor_settings
    _refuse_unknown(policy, settings)
    try:
        return _prompt(policy, settings)
    except ModelError as error:
        if not settings or not _works(policy, {}):
            raise
        # One of them is to blame where it alone is too much, or without it the others will do.
        alone = [key for key in settings if not _works(policy, {key: settings[key]})]
        last = [key for key in settings if _works(policy, {k: v for k, v in settings.items() if k != key})]
        key = next(iter([*alone, *last, *settings]))
        raise ConfigError(
            f"model.processor.{key}={settings[key]!r}: the processor of {policy.path} cannot use it: {_core(error)}"
        ) from error


def _forward(policy: Policy, prompt: EncodedPrompt) -> bool:
    """Whether ready-made vision features can be used; an error where it does not work without them either."""
    policy.inject_vision = True
    try:
        _use(policy, prompt)
    except Exception:  # noqa: BLE001 - at the boundary: a model's forward raises what it likes
        policy.inject_vision = False
        try:
            _use(policy, prompt)
        except Exception as error:
            raise _verdict(policy, prompt, error) from error
    return policy.inject_vision


def _use(policy: Policy, prompt: EncodedPrompt) -> None:
    """What a rollout worker and a learner do, at its smallest."""
    (output,) = decode_groups(Decoder(policy, max_rows=_ROWS), [DecodeRequest(prompt, _ROWS, _SAMPLING)])
    tokens = [completion.token_ids for completion in output.completions]
    with torch.no_grad():
        score_completions(policy, [prompt], None, [tokens], _SAMPLING.temperature, path="naive")


def _verdict(policy: Policy, prompt: EncodedPrompt, error: Exception) -> ModelError:
    """Whose fault it is: the checkpoint's, if transformers by itself cannot use it either."""
    kind = policy.hf_model.config.model_type
    what = f"model {policy.path!r} ({kind}): a first trial with a picture of {_SIZE[0]}×{_SIZE[1]}"
    try:
        logprobs = generated_logprobs(policy, prompt, torch.tensor([[policy.end_id] * 2]), _SAMPLING.temperature)
    except Exception as own:  # noqa: BLE001 - at the boundary: a model's forward raises what it likes
        return ModelError(
            f"{what} failed, in transformers' own forward: {brief(own)}; its config, processor and weights do not fit "
            "together: compare them with the original's, or fetch it again"
        )
    if bool(logprobs.isnan().any()):
        precise = "" if policy.dtype == torch.float32 else f", or {policy.dtype} is too coarse for it: try float32"
        return ModelError(
            f"{what} gave logits that are NaN, in transformers' own forward, too: its weights are broken: fetch it "
            f"again{precise}"
        )
    return ModelError(
        f"{what} failed, where transformers' own forward does not: {brief(error)}; this kind of model is not supported"
    )


def _prompt(policy: Policy, settings: Mapping[str, Any]) -> EncodedPrompt:
    sample = Sample(id="trial", images=(_picture(),), prompt="Describe the image.")
    try:
        (prompt,) = encode_prompts(replace(policy, processor_settings=dict(settings)), [sample])
    except DataError as error:
        raise ModelError(
            f"model {policy.path!r}: its chat template or its processor cannot be used: {error}; mend its "
            "processor_config.json and chat template, or fetch it again"
        ) from error
    length, unknown = prompt.input_ids.numel(), prompt.input_ids >= policy.vocab_size
    # Some families' image token is beyond the vocabulary: their own embedding passes over it.
    unknown &= prompt.input_ids != policy.placeholder_id
    if bool(unknown.any()):
        refuse_unknown_token(int(prompt.input_ids[unknown][0]), policy.vocab_size, policy.tokenizer, policy.path)
    if length + _SAMPLING.max_new_tokens > policy.context_length:
        raise ModelError(
            f"model {policy.path!r}: its context of {policy.context_length} tokens does not hold a picture of "
            f"{_SIZE[0]}×{_SIZE[1]} and a few words, which take {length} tokens; mend max_position_embeddings in its "
            "config.json, or choose another checkpoint"
        )
    if not bool((prompt.input_ids == policy.placeholder_id).any()):
        raise ModelError(
            f"model {policy.path!r}: a prompt with a picture holds no image token (id {policy.placeholder_id}); its "
            "chat template, its processor and its config do not fit together"
        )
    return prompt


def _works(policy: Policy, settings: Mapping[str, Any]) -> bool:
    try:
        _prompt(policy, settings)
    except ModelError:
        return False
    return True


def _refuse_unknown(policy: Policy, settings: Mapping[str, Any]) -> None:
    """Processors pass over what they do not know, with a warning at most."""
    processor = policy.processor
    own = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", {}).get("images_kwargs")
    known: set[str] = set()
    for kwargs in (own, getattr(processor.image_processor, "valid_kwargs", None)):
        known |= set(getattr(kwargs, "__annotations__", {}))
    for key in settings:
        if known and key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(known))}"
            raise ConfigError(f"model.processor.{key}: the processor of {policy.path} has no such setting; {hint}")


def _core(error: Exception) -> str:
    """What the library said, without what was put around it here."""
    while isinstance(error, MMRLError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return brief(error)


def _picture() -> bytes:
    """A PNG of a gradient."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(_SIZE).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
