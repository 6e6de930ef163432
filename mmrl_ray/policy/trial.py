"""Two uses of a model before a run: one trial of everything, and transformers' own log-probs of given completions.

**The trial** (`try_policy`): does this checkpoint work at all, here, before a worker or a sample is blamed for it? A
tiny picture goes the way of every sample, once: chat template, processor, vision tower, two tokens by the sampler,
their log-probs by the learner's plainest path. Whether the numbers are right is not asked here (`parity.py` does, on
real prompts); that none of it raises is.

**The judge** of the start-up comparison in `parity.py` (`generated_logprobs`): transformers' `generate`, made to take
each of the given tokens. Nothing of this project's forwards is in it: the processor's outputs go in as they are, and
masks, positions, token types, caches and what a model does to its logits are `generate`'s affair. It is causal by
construction: a token's logits are there before the next token is.

`N` completions of one prompt, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from mmrl_ray.data.images import encode_png
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, DataError, MMRLError, ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams
from mmrl_ray.policy.checkpoint import brief
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.model import Policy, computing
from mmrl_ray.policy.prompts import PER_TOKEN, encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.tokens import refuse_unknown_token

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
    kept = "" if policy.quantization is None else policy.quantization.model_dump_json()
    key = (policy.revision_key, policy.path, str(policy.dtype), policy.device.type, attention, kept)
    if key not in _passed:
        _passed[key] = _forward(policy, try_prompt(policy))
    policy.inject_vision = _passed[key]


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
    picture = encode_png(Image.linear_gradient("L").resize(_SIZE).convert("RGB"))
    sample = Sample(id="trial", images=(picture,), prompt="Describe the image.")
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


@torch.no_grad()
@computing
def generated_logprobs(policy: Policy, prompt: EncodedPrompt, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs, float32 [N, T], of completions int64 [N, T] of one prompt; its pixels are needed.

    Each completion alone, since some families' own batches change what they say (HunYuan-VL numbers pictures on through
    a batch). `temperature` and the forbidden image tokens are π's own. Raises
    whatever the model's `generate` raises.
    """
    model: Any = policy.hf_model
    accepted = _accepted(model)
    inputs = {"input_ids": prompt.input_ids[None], "attention_mask": torch.ones_like(prompt.input_ids)[None]}
    for name, value in prompt.model_inputs.items():
        if name in accepted or name not in PER_TOKEN:
            inputs[name] = value[None] if name in PER_TOKEN else value
    inputs = {n: v.to(policy.device, policy.dtype if v.is_floating_point() else None) for n, v in inputs.items()}
    settings = GenerationConfig(
        max_new_tokens=tokens.shape[1],
        do_sample=False,
        pad_token_id=policy.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
    )
    made = []
    with _own_settings(model):
        for row in tokens.tolist():
            # Not by a logits processor: Janus' `generate` drops those that it is given.
            output = model.generate(**inputs, generation_config=settings, prefix_allowed_tokens_fn=_Taken(row, prompt))
            made.append(torch.cat(output.logits))
    logits = torch.stack(made).float() / temperature
    logits[..., list(policy.image_token_ids)] = float("-inf")
    return logits.log_softmax(dim=-1).gather(-1, tokens.to(logits.device)[..., None])[..., 0]


class _Taken:
    """The one token that may come next in a row."""

    def __init__(self, tokens: list[int], prompt: EncodedPrompt) -> None:
        self._tokens, self._prompt_tokens = tokens, prompt.input_ids.numel()

    def __call__(self, row: int, seen: torch.Tensor) -> list[int]:
        return [self._tokens[seen.numel() - self._prompt_tokens]]


def _accepted(model: Any) -> set[str]:
    takes = (model.forward, model.prepare_inputs_for_generation)
    return {name for function in takes for name in inspect.signature(function).parameters}


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Without the checkpoint's generation settings: an end token or a penalty of theirs would end or change rows."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
