"""What a checkpoint's `generation_config.json` asks of the next token, in serving.

Hugging Face's `generate` penalises, suppresses and forces tokens by it, greedily too, so captions that are to equal
`generate`'s must: those of `mmrl serve` and `mmrl caption`. Training and evaluations never do: what is learnt from must
be drawn from the policy itself, whose log-probs the learner computes.

`G` rows of a group, `P` prompt tokens, `V` vocabulary. The processors are transformers' own, in `generate`'s order, and
see a row's prompt, image placeholders included, and its tokens.

vLLM's workers read this file, too (`vllm/mmrl_vllm_worker.py`), where there is nothing else of this project: it is
imported with torch and transformers alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as hf

if TYPE_CHECKING:
    from mmrl_ray.experience.carriers import SamplingParams
    from mmrl_ray.policy.model import Policy

logger = logging.getLogger(__name__)

# Those that change no greedy caption, or that others here answer for: lengths, ends of a turn, caches, outputs,
# speculation, and what only sampling and beams read.
_HARMLESS = frozenset(
    {
        *("max_length", "max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("early_stopping", "length_penalty", "num_return_sequences", "renormalize_logits", "forced_bos_token_id"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"),
        *("compile_config", "disable_compile", "continuous_batching_config", "transformers_version"),
    }
)
_OBEYED = (
    *("sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens"),
    *("forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
)
_NEUTRAL_ONE = ("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams", "num_beam_groups")


@dataclass(frozen=True, slots=True)
class GenerationRules:
    """What is obeyed of a generation config."""

    asked: Mapping[str, Any]
    """Keys of `_OBEYED` with values that change something; at least one."""
    eos: tuple[int, ...]

    def processors(
        self, prompt: torch.Tensor, *, min_new_tokens: int | None, max_new_tokens: int
    ) -> LogitsProcessorList:
        """For rows of one prompt, int64 [P]; where the request names a length itself the checkpoint's does not count.

        Raises:
            ValueError, TypeError: a value that transformers refuses.
        """
        asked, length, device = self.asked, prompt.numel(), str(prompt.device)
        eos = torch.tensor(self.eos, device=device)
        made = LogitsProcessorList()
        if (bias := asked.get("sequence_bias")) is not None:
            made.append(hf.SequenceBiasLogitsProcessor(bias))
        if (penalty := asked.get("repetition_penalty")) is not None:
            made.append(hf.RepetitionPenaltyLogitsProcessor(penalty))
        if (size := asked.get("no_repeat_ngram_size")) is not None:
            made.append(hf.NoRepeatNGramLogitsProcessor(size))
        if (words := asked.get("bad_words_ids")) is not None:
            made.append(hf.NoBadWordsLogitsProcessor(words, eos))
        if min_new_tokens is None:
            if (tokens := asked.get("min_new_tokens")) is not None:
                made.append(hf.MinNewTokensLengthLogitsProcessor(length, tokens, eos, device=device))
            elif (tokens := asked.get("min_length")) is not None:
                made.append(hf.MinLengthLogitsProcessor(tokens, eos, device=device))
        if (forced := asked.get("forced_eos_token_id")) is not None:
            longest = length + max_new_tokens
            made.append(hf.ForcedEOSTokenLogitsProcessor(longest, forced, device=device))
        if (decay := asked.get("exponential_decay_length_penalty")) is not None:
            made.append(hf.ExponentialDecayLengthPenalty(tuple(decay), eos, length))
        if (tokens := asked.get("suppress_tokens")) is not None:
            made.append(hf.SuppressTokensLogitsProcessor(tokens, device=device))
        if (tokens := asked.get("begin_suppress_tokens")) is not None:
            made.append(hf.SuppressTokensAtBeginLogitsProcessor(tokens, length, device=device))
        return made


class RuledGroup:
    """The rows of one prompt under a checkpoint's rules: what each has said, and what it may say next."""

    def __init__(self, rules: GenerationRules, prompt: torch.Tensor, rows: int, sampling: SamplingParams) -> None:
        """`prompt` is int64 [P] on the device of the logits."""
        self._processors = rules.processors(
            prompt, min_new_tokens=sampling.min_new_tokens, max_new_tokens=sampling.max_new_tokens
        )
        self._prompt_tokens = prompt.numel()
        self._said = torch.cat([prompt.repeat(rows, 1), prompt.new_zeros(rows, sampling.max_new_tokens)], dim=1)

    def apply(self, logits: torch.Tensor, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """float32 [R, V] of those of the group's rows that go on, `tokens` being what each has said: equally many."""
        length = self._prompt_tokens + len(tokens[0])
        index = torch.tensor(rows).to(logits.device, non_blocking=True)
        if tokens[0]:
            last = torch.tensor([each[-1] for each in tokens]).to(logits.device, non_blocking=True)
            self._said[index, length - 1] = last
        changed: torch.Tensor = self._processors(cast(torch.LongTensor, self._said[index, :length]), logits.float())
        return changed


def generation_rules(policy: Policy) -> GenerationRules | None:
    """The rules of a policy's checkpoint; None where it has none. Says in the log what was found.

    Raises:
        ModelError: a value of the generation config is none that transformers takes.
    """
    from mmrl_ray.errors import ModelError
    from mmrl_ray.experience.carriers import SamplingParams

    config = policy.hf_model.generation_config
    asked = {} if config is None else {n: v for n, v in _set(config).items() if n not in _HARMLESS}
    obeyed = {name: asked.pop(name) for name in _OBEYED if name in asked}
    if asked:
        logger.warning(
            "model %s: its generation_config.json asks for %s, which is not obeyed", policy.path, _told(asked)
        )
    if not obeyed:
        return None
    rules = GenerationRules(obeyed, policy.eos_token_ids)
    try:
        a = torch.zeros(1, dtype=torch.int64)
        sampling = SamplingParams(min_new_tokens=None)
        RuledGroup(rules, a, 1, sampling).apply(torch.zeros(1, policy.vocab_size), [0], [[]])
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ModelError(
            f"model {policy.path!r}: its generation_config.json ({_told(obeyed)}) cannot be obeyed: {error}; mend it"
        ) from error
    logger.info(
        "model %s: its generation_config.json asks for %s: obeyed here, as by transformers' generate; not in training "
        "and evaluations",
        *(policy.path, _told(obeyed)),
    )
    return rules


def _set(config: GenerationConfig) -> dict[str, Any]:
    """What the config sets of the keys that `generate` reads, where the value changes something."""
    known = vars(GenerationConfig())
    found = {name: value for name, value in vars(config).items() if name in known and not name.startswith("_")}
    return {
        name: value
        for name, value in found.items()
        if not (value is None or value is False or value in (0, [], {}) or (value == 1 and name in _NEUTRAL_ONE))
    }


def _told(values: Mapping[str, Any]) -> str:
    """For one line."""
    texts = {name: str(value) for name, value in values.items()}
    return ", ".join(f"{name}={text if len(text) <= 60 else f'{text[:59]}…'}" for name, text in texts.items())
