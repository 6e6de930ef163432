"""Attention of a decode step, against a softmax written out in NumPy float64 and against Hugging Face `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy import cpu
from mmrl_ray.policy.cpu import attend, attend_completions, decode_step_attention
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.model import Policy, SharedPrompts
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring import prefix
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import vision_features
from tests.support.tiny_models import FAMILIES, make_completions, make_samples
from tests.unit.policy.generation.test_decode_families import generated, ids

Load = Callable[..., Policy]
ROWS, KEYS, WIDTH = 5, 300, 64


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of queries that were handed on to transformers' own function."""
    shapes: list[torch.Size] = []
    own = cpu.sdpa_attention_forward

    def noted(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(query.shape)
        return own(module, query, *args, **kwargs)

    monkeypatch.setattr(cpu, "sdpa_attention_forward", noted)
    return shapes


def step(
    heads: int, groups: int, queries: int = 1, keys: int = KEYS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values; these two lie in buffers with room, as those of a decode loop do."""
    torch.manual_seed(7)
    held = [torch.randn(ROWS + 1, groups, keys + 9, WIDTH)[:ROWS, :, 4 : 4 + keys] for _ in range(2)]
    return torch.randn(ROWS, heads, queries, WIDTH), held[0], held[1]


@pytest.mark.parametrize(("heads", "groups"), [(6, 6), (8, 4), (12, 6)])
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_the_softmax_over_what_a_row_sees(
    heads: int, groups: int, mask: str, scaling: float | None, handed_on: list[torch.Size]
) -> None:
    query, key, value = step(heads, groups)
    seen = torch.rand(ROWS, 1, 1, KEYS) < 0.7
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    given = {"none": None, "bool": seen, "added": added}[mask]
    mixed, weights = attend(nn.Identity(), query, key, value, given, scaling=scaling, dropout=0.0, is_causal=False)
    expected = np.zeros((ROWS, 1, heads, WIDTH))
    for row in range(ROWS):
        visible = np.ones(KEYS, bool) if mask == "none" else seen[row, 0, 0].numpy()
        for head in range(heads):
            k, v = (t[row, head * groups // heads].double().numpy()[visible] for t in (key, value))
            scores = k @ query[row, head, 0].double().numpy() * (WIDTH**-0.5 if scaling is None else scaling)
            exps = np.exp(scores - scores.max())
            expected[row, 0, head] = (exps / exps.sum()) @ v
    np.testing.assert_allclose(mixed.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert weights is None
    assert handed_on == []


@pytest.mark.parametrize("why", ["two queries", "few keys", "a mask a head", "a bias"])
def test_everything_else_is_handed_on(why: str, handed_on: list[torch.Size]) -> None:
    query, key, value = step(6, 6, 2 if why == "two queries" else 1, 100 if why == "few keys" else KEYS)
    mask = torch.rand(ROWS, 6, 1, KEYS) < 0.7 if why == "a mask a head" else None
    more = {"position_bias": torch.randn(ROWS, 6, 1, KEYS)} if why == "a bias" else {}
    mixed, _ = attend(nn.Identity(), query, key, value, mask, **more)
    bias = more.get("position_bias", mask)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=False)
    if why == "two queries":
        expected = nn.functional.scaled_dot_product_attention(query, key[:, :, :2], value[:, :, :2], is_causal=True)
    torch.testing.assert_close(mixed, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert handed_on == [query.shape]


def test_a_mask_is_made_into_numbers_once_and_anew_when_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    own = cpu.sdpa_attention_forward

    def noted(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        given.append(mask)
        return own(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(cpu, "sdpa_attention_forward", noted)
    query, key, value = step(6, 6, queries=2)
    mask = torch.rand(ROWS, 1, 2, KEYS) < 0.7
    for change in range(2):
        found = [attend(nn.Identity(), query, key, value, mask)[0] for _ in range(2)]
        expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
        assert all(torch.equal(each, expected) for each in found)
        assert given[2 * change] is given[2 * change + 1]
        mask[:, :, :, : KEYS // 2] = True


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rows_stay_what_generate_gives(
    family: str, load: Load, monkeypatch: pytest.MonkeyPatch, handed_on: list[torch.Size]
) -> None:
    """Packed and not."""
    policy = load(family)
    prompts = encode_prompts(policy, make_samples())
    expected = [generated(policy, prompt) for prompt in prompts]
    handed_on.clear()  # of a model's first trial
    monkeypatch.setattr(cpu, "_MANY_KEYS", 1)
    greedy = SamplingParams(max_new_tokens=9, greedy=True)
    for packed in (None, False):
        outs = decode_groups(Decoder(policy, packed=packed), [DecodeRequest(p, 1, greedy) for p in prompts])
        assert [ids(out.completions[0]) for out in outs] == expected
    assert handed_on == []


def test_it_is_the_models_for_the_time_of_a_step(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load()
    attended: list[int] = []
    monkeypatch.setattr(cpu, "_MANY_KEYS", 1)
    matmul = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: attended.append(a.shape[-2]) or matmul(a, b))
    prompts = encode_prompts(policy, make_samples())[:1]
    decode_groups(Decoder(policy), [DecodeRequest(prompts[0], 1, SamplingParams(max_new_tokens=3, greedy=True))])
    layers = policy.hf_model.config.get_text_config().num_hidden_layers
    assert len(attended) >= 2 * layers, "no decode step went through it"
    assert policy.hf_model.config.get_text_config()._attn_implementation == "sdpa"


def test_an_error_inside_leaves_the_model_as_it_was(load: Load) -> None:
    policy = load()
    config = policy.hf_model.config.get_text_config()
    with pytest.raises(RuntimeError, match="stop"), decode_step_attention(policy):
        raise RuntimeError("stop")
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize("section", [{"attn_implementation": "eager"}, {"dtype": "bfloat16"}])
def test_other_models_keep_their_own(load: Load, section: dict[str, Any]) -> None:
    policy = load(**section)
    with decode_step_attention(policy):
        own = policy.hf_model.config.get_text_config()._attn_implementation
    assert own == section.get("attn_implementation", "sdpa")


PROMPTS, REPEATS, SEEN, TOKENS = 3, 2, 9, 5


def attended(
    attend_to: Callable[..., torch.Tensor], dtype: torch.dtype, *, groups: int, tokens: int, mask: str, width: int = 8
) -> list[torch.Tensor]:
    """What 4 heads of completions make of prompts and themselves, then the gradients of all that goes in."""
    generator = torch.Generator().manual_seed(1)
    rows = PROMPTS * REPEATS
    shapes = [(rows, 4, tokens, width), *[(PROMPTS, groups, SEEN, width)] * 2, *[(rows, groups, tokens, width)] * 2]
    given = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    outside = torch.randn(rows, tokens, 4, width, generator=generator, dtype=torch.float64).to(dtype)
    own = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(rows, 1, -1, -1)
    of_prompt = torch.rand(rows, 1, 1, SEEN, generator=generator) < 0.7
    seen = torch.cat([of_prompt.expand(-1, -1, tokens, -1), own], dim=3)
    if mask == "none":
        seen = torch.ones_like(seen)
    mixed = attend_to(*given, seen, mask)
    return [mixed, *torch.autograd.grad(mixed, given, outside)]


def by_hand(q: Any, pk: Any, pv: Any, k: Any, v: Any, seen: torch.Tensor, mask: str) -> torch.Tensor:
    heads = q.shape[1] // k.shape[1]
    joined = [torch.cat([shared.repeat_interleave(REPEATS, 0), own], 2) for shared, own in ((pk, k), (pv, v))]
    keys, values = (each.repeat_interleave(heads, 1) for each in joined)
    scores = (q @ keys.transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


def apart(q: Any, pk: Any, pv: Any, k: Any, v: Any, seen: torch.Tensor, mask: str) -> torch.Tensor:
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    given = {"none": None, "bool": seen, "added": added}[mask]
    keys = k * 1.0
    keys.prompts = SharedPrompts(pk, pv, REPEATS)
    return attend_completions(nn.Identity(), q, keys, v, given, scaling=0.3)[0]


@pytest.mark.parametrize(
    ("groups", "tokens", "mask", "is_apart"),
    [
        (4, TOKENS, "bool", True),
        (2, TOKENS, "bool", True),
        (2, TOKENS, "added", True),
        (4, 1, "none", True),
        (1, TOKENS, "bool", False),  # more weights to keep than copies of keys
    ],
)
def test_completions_attend_to_prompts_that_they_share(
    groups: int, tokens: int, mask: str, is_apart: bool, handed_on: list[torch.Size]
) -> None:
    """Against float64, gradients too."""
    sizes: dict[str, Any] = {"groups": groups, "tokens": tokens, "mask": mask}
    found, expected = attended(apart, torch.float32, **sizes), attended(by_hand, torch.float64, **sizes)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert bool(handed_on) != is_apart


def test_a_model_that_changes_its_caches_keys_is_refused() -> None:
    query, key, value = (torch.randn(4, 2, 3, 8) for _ in range(3))
    with pytest.raises(ModelError, match="Identity computes with its cache's keys"):
        attend_completions(nn.Identity(), query, key, value, torch.ones(4, 1, 3, 12, dtype=torch.bool))
    plain, _ = attend_completions(nn.Identity(), query, key, value, torch.ones(4, 1, 3, 3, dtype=torch.bool))
    torch.testing.assert_close(plain, nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2))


def test_no_key_of_a_prompt_is_copied_for_its_completions(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load()
    prompts = encode_prompts(policy, make_samples()[:2])
    completions = make_completions(policy, ((3, 9), (5, 2)))
    copied: list[torch.Size] = []
    monkeypatch.setattr(prefix._Behind, "apply", lambda *args: copied.append(args[0].shape))
    score_completions(policy, prompts, vision_features(policy, prompts), completions, 1.0)
    assert copied == []
    assert policy.hf_model.config.get_text_config()._attn_implementation == "sdpa"
