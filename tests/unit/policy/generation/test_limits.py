"""How much a decode loop takes on, of the memory there is, and what of it is given back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import psutil
import pytest
import torch

from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.memory import DecodeLimits, trim_heap
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from tests.support.tiny_models import FAMILIES, make_samples

Load = Callable[..., Policy]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokens_keys_are_counted_as_the_cache_holds_them(family: str, load: Load) -> None:
    policy = load(family)
    prompt = encode_prompts(policy, make_samples())[0]
    decoder = Decoder(policy)
    handle = decoder.admit(prompt, 1, SamplingParams(max_new_tokens=4))
    decoder.step()
    layers = decoder._batches[0]._cache.layers
    decoder.cancel(handle)
    held = sum(t[:1].nbytes // t.shape[2] for layer in layers for t in (layer.keys, layer.values))  # type: ignore[union-attr]
    assert policy.key_bytes == held


def test_a_gpu_takes_on_what_it_has_memory_for(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load()
    assert DecodeLimits.of(policy, 64) == DecodeLimits()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    policy.device = torch.device("cuda")
    found = []
    for free in (1 << 20, 1 << 26, 1 << 28, 1 << 40):
        limits = DecodeLimits.of(policy, 64)
        found.append(limits)
        assert limits.max_rows * (64 * policy.key_bytes + 4 * policy.vocab_size) <= free
        assert limits.prefill_tokens * (policy.key_bytes + 4 * policy.hidden_size) <= free
    assert found == sorted(found)
    assert found[0].max_rows < DecodeLimits().max_rows < found[-1].max_rows
    assert found[-1].prefill_tokens == DecodeLimits().prefill_tokens


def test_a_loop_of_few_rows_still_decodes_all(load: Load) -> None:
    policy = load()
    limits = DecodeLimits.within(policy, 1, 8)
    requests = [DecodeRequest(p, 1, SamplingParams(max_new_tokens=8)) for p in encode_prompts(policy, make_samples())]
    decoder = Decoder(policy, max_rows=limits.max_rows, prefill_tokens=limits.prefill_tokens)
    assert [len(out.completions) for out in decode_groups(decoder, requests)] == [1, 1, 1]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has no such call")
def test_the_heap_of_freed_tensors_is_given_back() -> None:
    """They are too small to have pages of their own, and the last one holds the heap's end where it is."""
    size, count = 100_000, 3000
    tensors = [torch.ones(size, dtype=torch.uint8) for _ in range(count)]
    del tensors[:-1]
    before = psutil.Process().memory_info().rss
    trim_heap()
    assert before - psutil.Process().memory_info().rss > size * count // 2
    assert int(tensors[0].sum()) == size
