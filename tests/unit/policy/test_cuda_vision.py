"""Attention within pictures and windows, as a CUDA GPU is given it, on a CPU: against pieces taken one by one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from mmrl_ray.policy import cuda, vision
from mmrl_ray.policy.cuda import attend_within, use_attention_within
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import vision_features
from tests.support.tiny_models import make_samples

Load = Callable[..., Policy]
HEADS, WIDTH = 3, 8
CUTS = {"equal": (0, 4, 8, 12), "unequal": (0, 5, 6, 13), "one": (0, 9)}


def softmax_by_piece(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: tuple[int, ...], scale: float
) -> torch.Tensor:
    """[S, H, d] of [S, H, d] each."""
    rows = []
    for start, end in pairwise(starts):
        q, k, v = (each[start:end].transpose(0, 1) for each in (query, key, value))
        exps = (q @ k.transpose(1, 2) * scale).exp()
        rows.append((exps / exps.sum(dim=-1, keepdim=True) @ v).transpose(0, 1))
    return torch.cat(rows)


def numbers(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(tokens, HEADS, WIDTH, dtype=torch.float64, generator=generator) for _ in range(3)]
    return [each.requires_grad_() for each in made]


def attended(given: list[torch.Tensor], starts: tuple[int, ...], **settings: Any) -> torch.Tensor:
    rows = [each.transpose(0, 1)[None] for each in given]
    cuts, longest = torch.tensor(starts, dtype=torch.int32), max(end - start for start, end in pairwise(starts))
    more = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": longest, "max_length_k": longest}
    mixed, weights = attend_within(nn.Identity(), *rows, None, **more, **settings)
    assert weights is None
    return mixed


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("kernel", [False, True])
def test_tokens_see_their_piece(kind: str, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the kernel of variable lengths, and in one batch where there is none."""
    starts = CUTS[kind]
    if kernel:

        def of_pieces(q: Any, k: Any, v: Any, cuts: Any, _: Any, most: int, __: int, *, scale: float) -> torch.Tensor:
            assert cuts.dtype == torch.int32
            assert most == max(end - start for start, end in pairwise(starts))
            return softmax_by_piece(q, k, v, tuple(cuts.tolist()), scale)

        monkeypatch.setattr(cuda, "_has_kernel", lambda query: True)
        monkeypatch.setattr(cuda, "varlen_attn", of_pieces)
    given = numbers(starts[-1])
    mixed = attended(given, starts, scaling=0.4)
    expected = softmax_by_piece(*given, starts, 0.4)
    torch.testing.assert_close(mixed, expected[None], rtol=1e-12, atol=1e-13)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    mine = torch.autograd.grad((mixed[0] * direction).sum(), given)
    theirs = torch.autograd.grad((expected * direction).sum(), given)
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


class Calls:
    """Calls of attention."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        own = nn.functional.scaled_dot_product_attention

        def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.count += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
        monkeypatch.setattr(cuda, "scaled_dot_product_attention", noted)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_a_tower_gives_the_same_by_one_call_a_layer(family: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(family)
    monkeypatch.setattr(vision, "_alone", lambda policy: False)  # all pictures by one pass, as on a GPU
    prompts = encode_prompts(policy, make_samples([(64, 64), (96, 64), (64, 160), (200, 120)]))
    calls = Calls(monkeypatch)
    expected = vision_features(policy, prompts)
    before, calls.count = calls.count, 0
    use_attention_within(policy.hf_model)
    got = vision_features(policy, prompts)
    layers = len(policy.core.visual.blocks)
    assert calls.count == layers
    assert before >= len(prompts) * layers
    for mine, theirs in zip(got, expected, strict=True):
        for one, other in zip((mine.tokens, *mine.deepstack), (theirs.tokens, *theirs.deepstack), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert policy.attention == "sdpa"


@pytest.mark.parametrize("family", ["llava", "internvl", "gemma3", "smolvlm"])
def test_towers_that_see_whole_pictures_stay(family: str, load: Load) -> None:
    policy = load(family)
    use_attention_within(policy.hf_model)
    kinds = {c._attn_implementation for m in policy.hf_model.modules() if (c := getattr(m, "config", None)) is not None}
    assert kinds == {"sdpa"}
