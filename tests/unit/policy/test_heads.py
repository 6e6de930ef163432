"""Value heads against float64 NumPy, decoding by them against a greedy loop of whole rows, and their files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss
from transformers import AutoModelForImageTextToText

from mmrl_ray.config.sections import LoraSection
from mmrl_ray.errors import AdapterError, ConfigError
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams
from mmrl_ray.policy import heads as value_heads
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.heads import (
    HEADS_FILE,
    LearningHeads,
    ValueHeads,
    add_decoding_heads,
    add_learning_heads,
    decoding_heads,
    learning_heads,
    published,
    read_heads_state,
    save_value_heads,
    split_heads,
)
from mmrl_ray.policy.lora.adapter import add_adapter, save_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from tests.support.tiny_models import FAMILIES, make_samples

Load = Callable[..., Policy]
D, V, WIDTH, FORBIDDEN = 6, 11, 5, (2, 7)
GREEDY = SamplingParams(max_new_tokens=6, greedy=True)


def random_heads(hidden: int = D, vocabulary: int = V, *, seed: int = 0, scale: float = 1.0) -> LearningHeads:
    heads = LearningHeads(hidden, vocabulary, WIDTH, beta=2.5, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return heads


def numpy_head(head: torch.nn.Module, hidden: torch.Tensor) -> np.ndarray:
    first, _, last = head  # type: ignore[misc]
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in (first.weight, first.bias, last.weight, last.bias))
    return np.maximum(hidden.double().numpy() @ w1.T + b1, 0) @ w2.T + b2


@pytest.mark.parametrize("chunk", [1 << 20, 3 * V])
def test_values_are_those_of_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(value_heads, "CHUNK_ELEMENTS", chunk)
    heads = random_heads()
    hidden = torch.randn(8, D, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([0, 1, 3, 4, 5, 6, 8, 10])
    found = heads.values(hidden, tokens, FORBIDDEN)
    rows = np.arange(8)
    for k in range(2):
        q = numpy_head(heads.online[k], hidden)
        np.testing.assert_allclose(found.q[k].detach().numpy(), q[rows, tokens], rtol=1e-4, atol=1e-5)
        allowed = np.exp(np.delete(q, FORBIDDEN, axis=1))
        expected = np.log(allowed.sum(axis=1)) - q[rows, tokens]
        np.testing.assert_allclose(found.conservative[k].detach().numpy(), expected, rtol=1e-4, atol=1e-5)
        target = numpy_head(heads.q[k], hidden)[rows, tokens]
        np.testing.assert_allclose(found.target_q[k].numpy(), target, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.v.detach().numpy(), numpy_head(heads.v, hidden)[:, 0], rtol=1e-4, atol=1e-5)
    (found.q.sum() + found.conservative.sum() + found.v.sum() + found.target_q.sum()).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in heads.learnt())
    assert all(p.grad is None for p in heads.q.parameters()), "a target learns by following alone"


def test_a_chunk_more_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, tokens = torch.randn(7, D), torch.tensor([0, 1, 3, 4, 5, 6, 8])
    grads = []
    for chunk in (1 << 20, 2 * V):
        monkeypatch.setattr(value_heads, "CHUNK_ELEMENTS", chunk)
        heads = random_heads()
        found = heads.values(hidden, tokens, FORBIDDEN)
        (found.q.square().sum() + found.conservative.sum() + found.v.sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in heads.learnt() if p.grad is not None]))
    assert mse_loss(*grads) < 1e-8


def test_advantages_take_the_smaller_target() -> None:
    heads = random_heads()
    hidden = torch.randn(4, D)
    expected = np.minimum(*(numpy_head(q, hidden) for q in heads.q)) - numpy_head(heads.v, hidden)
    np.testing.assert_allclose(heads.advantages(hidden).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_fresh_heads_say_nothing_and_are_a_function_of_the_seed() -> None:
    before = torch.get_rng_state()
    a, b, c = (LearningHeads(D, V, WIDTH, 1.0, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert bool((a.advantages(torch.randn(2, D)) == 0).all())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.online[0][0].weight, c.online[0][0].weight)  # type: ignore[index]
    assert not torch.equal(a.online[0][0].weight, a.online[1][0].weight)  # type: ignore[index]
    assert torch.equal(a.online[0][0].weight, a.q[0][0].weight)  # type: ignore[index]


def test_targets_follow_by_the_rate() -> None:
    heads = random_heads()
    target, online = heads.q[1][2].bias.clone(), heads.online[1][2].bias.detach().clone()  # type: ignore[index]
    heads.follow(0.25)
    assert torch.allclose(heads.q[1][2].bias, 0.75 * target + 0.25 * online)  # type: ignore[index]
    assert torch.equal(heads.online[1][2].bias, online)  # type: ignore[index]


# -- decoding --------------------------------------------------------------------------------------------------------


def valued(policy: Policy, *, scale: float = 0.5) -> ValueHeads:
    heads = random_heads(policy.hidden_size, policy.vocab_size, scale=scale)
    policy.value_heads[None] = heads
    return heads


def greedy_loop(policy: Policy, prompt: EncodedPrompt, beta: float, length: int) -> tuple[list[int], list[float]]:
    """Token by token, each time the Hugging Face model on one whole row, without a cache."""
    heads = policy.value_heads[None]
    head = policy.hf_model.get_output_embeddings()
    tokens: list[int] = []
    logprobs: list[float] = []
    seen: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    while len(tokens) < length and not (tokens and tokens[-1] in policy.eos_token_ids):
        row = torch.cat([prompt.input_ids, torch.tensor(tokens, dtype=torch.int64)])[None]
        inputs = {
            name: torch.cat([value, value.new_zeros(len(tokens))])[None] if name.endswith("token_type_ids") else value
            for name, value in prompt.model_inputs.items()
        }
        with torch.no_grad():
            logits = policy.model(input_ids=row, use_cache=False, **inputs).logits[0, -1].double()
            hidden = seen[-1][0, -1]
            q = np.minimum(*(numpy_head(each, hidden[None])[0] for each in heads.q))
        scores = logits.numpy() + beta * (q - numpy_head(heads.v, hidden[None])[0])
        scores[list(policy.image_token_ids)] = -math.inf
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores.max() - np.logaddexp.reduce(scores)))
    handle.remove()
    return tokens, logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_takes_the_best_of_policy_and_values(load: Load, family: str) -> None:
    policy = load(family)
    valued(policy)
    prompts = encode_prompts(policy, make_samples())
    sampling = dataclasses.replace(GREEDY, value_beta=1.5)
    plain = decode_groups(Decoder(policy), [DecodeRequest(p, 1, GREEDY) for p in prompts])
    for packed in (None, False):
        found = decode_groups(Decoder(policy, packed=packed), [DecodeRequest(p, 2, sampling) for p in prompts])
        for prompt, output in zip(prompts, found, strict=True):
            tokens, logprobs = greedy_loop(policy, prompt, 1.5, 6)
            for completion in output.completions:
                assert completion.token_ids.tolist() == tokens
                assert completion.logprobs.tolist() == pytest.approx(logprobs, abs=2e-4)
    assert any(
        not torch.equal(a.completions[0].token_ids, b.completions[0].token_ids)
        for a, b in zip(plain, found, strict=True)
    )


def test_beta_of_0_is_the_plain_policy_bit_for_bit_beside_rows_that_have_one(load: Load) -> None:
    policy = load()
    prompts = encode_prompts(policy, make_samples())
    sampled = SamplingParams(max_new_tokens=8, temperature=1.2, seed=3)
    requests = [DecodeRequest(p, 3, s, greedy_extra=True) for p in prompts for s in (sampled, GREEDY)]
    bare = decode_groups(Decoder(policy), requests)
    valued(policy)
    steered = [DecodeRequest(p, 3, dataclasses.replace(sampled, value_beta=2.0)) for p in prompts]
    found = decode_groups(Decoder(policy), [*requests, *steered])
    for a, b in zip(bare, found, strict=False):
        assert a.greedy is not None
        assert b.greedy is not None
        for x, y in zip((*a.completions, a.greedy), (*b.completions, b.greedy), strict=True):
            assert torch.equal(x.token_ids, y.token_ids)
    alone = decode_groups(Decoder(policy), requests)
    for a, b in zip(bare, alone, strict=True):
        assert all(torch.equal(x.logprobs, y.logprobs) for x, y in zip(a.completions, b.completions, strict=True))


def test_forbidden_tokens_stay_forbidden_whatever_they_are_worth(load: Load) -> None:
    policy = load()
    heads = valued(policy)
    with torch.no_grad():
        for q in heads.q:
            q[2].bias[list(policy.image_token_ids)] = 1e6  # type: ignore[index]
    sampling = SamplingParams(max_new_tokens=8, temperature=2.0, value_beta=3.0)
    outputs = decode_groups(
        Decoder(policy), [DecodeRequest(p, 8, sampling) for p in encode_prompts(policy, make_samples())]
    )
    said = {token for output in outputs for c in output.completions for token in c.token_ids.tolist()}
    assert said
    assert not said & set(policy.image_token_ids)


def test_values_that_are_not_there_cannot_be_asked_for(load: Load) -> None:
    policy = load()
    (prompt,) = encode_prompts(policy, make_samples(((64, 64),)))
    with pytest.raises(ConfigError, match="value_beta=1 needs value heads"):
        Decoder(policy).admit(prompt, 1, dataclasses.replace(GREEDY, value_beta=1.0))
    valued(policy)
    for beta in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="value_beta"):
            Decoder(policy).admit(prompt, 1, dataclasses.replace(GREEDY, value_beta=beta))


# -- files -----------------------------------------------------------------------------------------------------------


def test_they_lie_beside_an_adapter_that_peft_still_loads(load: Load, tmp_path: Path) -> None:
    policy = load()
    add_adapter(policy, LoraSection(r=2), seed=0)
    heads = add_learning_heads(policy, beta=7.0, width=3, seed=1)
    assert learning_heads(policy) is heads
    assert heads.width == 3
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_()
    save_adapter(policy.model, tmp_path)
    for whole in (True, False):
        save_value_heads(heads, tmp_path, whole=whole)
        assert any(name.startswith("online.") for name in load_file(tmp_path / HEADS_FILE)) == whole
        other = load()
        add_decoding_heads(other, tmp_path)
        found = other.value_heads[None]
        assert (found.beta, type(found)) == (7.0, ValueHeads)
        hidden = torch.randn(3, policy.hidden_size)
        assert torch.equal(found.advantages(hidden), heads.advantages(hidden))
        assert not any(p.requires_grad for p in found.parameters())
    PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(policy.path), str(tmp_path))


def test_weights_travel_beside_those_of_an_adapter(load: Load) -> None:
    policy = load()
    heads = valued(policy)
    adapter, found = split_heads({"lora": torch.ones(1), **published(heads)})
    assert list(adapter) == ["lora"]
    hidden = torch.randn(3, policy.hidden_size)
    assert torch.equal(decoding_heads(policy, found).advantages(hidden), heads.advantages(hidden))
    assert split_heads(adapter)[1] == {}


def test_a_file_that_does_not_fit_is_refused(load: Load, tmp_path: Path) -> None:
    policy = load()
    heads = valued(policy)
    assert read_heads_state(tmp_path) is None
    file = tmp_path / HEADS_FILE

    def refused(match: str) -> None:
        with pytest.raises(AdapterError, match=match):
            add_decoding_heads(policy, tmp_path)

    save_value_heads(heads, tmp_path, whole=False)
    state = load_file(file)
    sound = {"beta": "1.0"}
    save_file({**state, "q.0.2.bias": torch.full_like(state["q.0.2.bias"], math.nan)}, file, metadata=sound)
    refused("q.0.2.bias holds NaN")
    save_file({**state, "q.0.2.bias": torch.zeros(3)}, file, metadata=sound)
    refused(r"q.0.2.bias has shape \[3\]")
    save_file({k: t for k, t in state.items() if k != "q.1.0.weight"}, file, metadata=sound)
    refused("q.1.0.weight")
    save_file({"x": torch.zeros(1)}, file, metadata=sound)
    refused("lack the weight of their first layer")
    save_file(state, file, metadata={"format": "pt"})
    refused("beta=nan")
    file.write_bytes(b"nothing")
    refused("is broken")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    refused("symbolic link")
    with pytest.raises(ValueError, match="no value heads that learn"):
        learning_heads(load())
