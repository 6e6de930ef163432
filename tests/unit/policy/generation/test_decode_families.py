"""The decode loop against Hugging Face `generate` and against the scorer, in six families and both layouts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmrl_ray.config.sections import LoraSection
from mmrl_ray.experience.carriers import Completion, EncodedPrompt, SamplingParams
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.lora.adapter import adapter_parameters, add_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import PER_TOKEN, encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import vision_features
from tests.support.tiny_models import FAMILIES, make_samples

Load = Callable[..., Policy]
TOKENS = 9
GREEDY = SamplingParams(max_new_tokens=TOKENS, greedy=True)


@pytest.fixture(params=FAMILIES)
def policy(request: pytest.FixtureRequest, load: Load) -> Policy:
    return load(request.param)


def generated(policy: Policy, prompt: EncodedPrompt, **settings: object) -> list[int]:
    """Greedy tokens by Hugging Face `generate`, on the one prompt alone."""
    inputs = {n: value[None] if n in PER_TOKEN else value for n, value in prompt.model_inputs.items()}
    if policy.hf_model.config.model_type in ("llava", "internvl", "smolvlm"):
        inputs.pop("mm_token_type_ids", None)
    ids = prompt.input_ids[None]
    out = policy.hf_model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        suppress_tokens=list(policy.image_token_ids),
        eos_token_id=list(policy.eos_token_ids),
        pad_token_id=policy.pad_token_id,
        **{"max_new_tokens": TOKENS, **settings},
        **inputs,
    )
    return out[0, ids.shape[1] :].tolist()


def ids(completion: Completion | None) -> list[int]:
    assert completion is not None
    return completion.token_ids.tolist()


def test_greedy_rows_are_what_generate_gives(policy: Policy) -> None:
    prompts = encode_prompts(policy, make_samples())
    assert len({prompt.input_ids.numel() for prompt in prompts}) > 1  # the batch is padded
    expected = [generated(policy, prompt) for prompt in prompts]
    alone = [decode_groups(Decoder(policy), [DecodeRequest(p, 1, GREEDY)])[0] for p in prompts]
    assert [ids(out.completions[0]) for out in alone] == expected
    sampled = SamplingParams(max_new_tokens=TOKENS, temperature=1.5)
    for packed in (None, False):
        outs = decode_groups(
            Decoder(policy, packed=packed), [DecodeRequest(p, 2, sampled, greedy_extra=True) for p in prompts]
        )
        assert [ids(out.greedy) for out in outs] == expected
        assert all(len(out.completions) == 2 for out in outs)


def test_greedy_rows_with_a_minimum_length_are_what_generate_gives(policy: Policy) -> None:
    prompt = encode_prompts(policy, make_samples())[0]
    # The token that comes second is made an end token, so that the minimum bites.
    policy.eos_token_ids = (generated(policy, prompt, max_new_tokens=2)[1],)
    assert len(generated(policy, prompt)) <= 2
    sampling = SamplingParams(max_new_tokens=TOKENS, min_new_tokens=6, greedy=True)
    out = decode_groups(Decoder(policy), [DecodeRequest(prompt, 1, sampling)])[0]
    assert ids(out.completions[0]) == generated(policy, prompt, min_new_tokens=6)


@pytest.mark.parametrize("packed", [None, False])
def test_log_probs_are_the_scorers(policy: Policy, packed: bool | None) -> None:
    add_adapter(policy, LoraSection(r=2), seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(policy.model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    # Some words end a row: ragged completions, so that finished rows are dropped.
    policy.eos_token_ids = (*policy.eos_token_ids, *range(policy.vocab_size - 6, policy.vocab_size))
    prompts = encode_prompts(policy, make_samples())
    decoder = Decoder(policy, packed=packed)
    requests = [
        DecodeRequest(prompt, 5, SamplingParams(temperature=1.4, max_new_tokens=14, seed=i), greedy_extra=True)
        for i, prompt in enumerate(prompts)
    ]
    outs = decode_groups(decoder, requests)
    assert decoder.counters["compactions"] > 0
    groups = [[*out.completions, out.greedy] for out in outs]
    completions = [[c.token_ids for c in group if c is not None] for group in groups]
    with torch.no_grad():
        features = vision_features(policy, prompts)
        scores = score_completions(policy, prompts, features, completions, 1.4)
    flat = [c for group in groups for c in group if c is not None]
    assert len({c.token_ids.numel() for c in flat}) > 2
    for i, completion in enumerate(flat):
        torch.testing.assert_close(completion.logprobs, scores.logprobs[i][scores.mask[i]], rtol=0, atol=1e-5)
        ended = int(completion.token_ids[-1]) in policy.eos_token_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        assert not any(t in policy.eos_token_ids for t in completion.token_ids[:-1].tolist())


@pytest.mark.parametrize("packed", [None, False])
def test_groups_that_come_and_go_do_not_change_a_greedy_row(policy: Policy, packed: bool | None) -> None:
    prompts = encode_prompts(policy, make_samples())
    expected = [generated(policy, prompt, max_new_tokens=12) for prompt in prompts]
    greedy = SamplingParams(max_new_tokens=12, greedy=True)
    sampled = SamplingParams(max_new_tokens=12, temperature=1.5)
    decoder = Decoder(policy, packed=packed)
    first = decoder.admit(prompts[0], 1, greedy)
    passing = decoder.admit(prompts[1], 2, sampled)
    for _ in range(3):
        decoder.step()
    second = decoder.admit(prompts[2], 1, sampled, greedy_extra=True)
    decoder.step()
    decoder.cancel(passing)
    decoder.step()
    third = decoder.admit(prompts[1], 1, greedy)
    decoder.drain()
    assert ids(decoder.take(first).completions[0]) == expected[0]
    assert ids(decoder.take(second).greedy) == expected[2]
    assert ids(decoder.take(third).completions[0]) == expected[1]
    sliding = policy.hf_model.config.model_type == "gemma3"
    assert (decoder.counters["merges"] == 0) == sliding
    assert (decoder.counters["unmerged_rows"] == decoder.counters["rows"]) == sliding
