"""Decode steps on tensors that stay in place, recorded once and done again: what they give, and that they are."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from mmrl_ray.config.sections import LoraSection
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy.cuda import use_grouped_attention
from mmrl_ray.policy.generation import decode_batch
from mmrl_ray.policy.generation.base import GroupOutput
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.lora.adapter import add_adapter
from mmrl_ray.policy.lora.routing import BASE, RowAdapters
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from tests.support.recorded import Recorder
from tests.support.tiny_models import FAMILIES, make_samples
from tests.unit.policy.generation.test_decode_families import generated, ids
from tests.unit.policy.lora.test_adapter import train_a_little

Load = Callable[..., Policy]
TOKENS = 20


def recording(policy: Policy, **settings: bool) -> Recorder:
    recorder = Recorder(**settings)
    policy.acceleration = dataclasses.replace(policy.acceleration, capture=recorder)
    return recorder


def requests(policy: Policy) -> list[DecodeRequest]:
    """Rows that end at different times, in groups of different sizes."""
    prompts = encode_prompts(policy, make_samples())
    return [
        DecodeRequest(
            p, 2 + i, SamplingParams(max_new_tokens=TOKENS - 5 * i, seed=i, temperature=1.3), greedy_extra=True
        )
        for i, p in enumerate([*prompts, prompts[0]])
    ]


def assert_same(mine: list[GroupOutput], theirs: list[GroupOutput]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        for one, other in zip((*a.completions, a.greedy), (*b.completions, b.greedy), strict=True):
            assert one is not None
            assert other is not None
            assert ids(one) == ids(other)
            assert one.finish_reason == other.finish_reason
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grouped", [False, True])
def test_recorded_steps_give_what_steps_give(
    family: str, grouped: bool, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rows end and are dropped, groups join, and room for keys runs out."""
    policy = load(family)
    monkeypatch.setattr(decode_batch, "_ROOM_STEPS", 7)
    # Memory as it is found: what a mask hides must not be NaN.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *shape: t.new_full(shape, float("nan")))
    expected = decode_groups(Decoder(policy, max_rows=12), requests(policy))
    greedy = [generated(policy, r.prompt, max_new_tokens=r.sampling.max_new_tokens) for r in requests(policy)]
    recorder = recording(policy)
    if grouped:
        use_grouped_attention(policy.hf_model)
    decoder = Decoder(policy, max_rows=12)
    got = decode_groups(decoder, requests(policy))
    assert_same(got, expected)
    assert [ids(out.greedy) for out in got] == greedy
    if family == "gemma3":  # its rows outgrow the sliding window, and their cache drops keys by itself
        assert recorder.captures == 0
        return
    assert decoder.counters["compactions"] > 0
    assert decoder.counters["merges"] > 0
    assert recorder.captures < recorder.replays
    assert recorder.replays > decoder.counters["passes"] / 3


def test_a_batch_without_change_records_one_step(load: Load) -> None:
    policy = load()
    recorder = recording(policy)
    prompts = encode_prompts(policy, make_samples())
    endless = dataclasses.replace(policy, eos_token_ids=())
    sampling = SamplingParams(max_new_tokens=TOKENS, seed=1)
    decode_groups(Decoder(endless), [DecodeRequest(p, 3, sampling) for p in prompts])
    # The first token comes of the prompts, and one step goes by itself.
    assert (recorder.captures, recorder.replays) == (1, TOKENS - 2)


def test_a_recorded_step_makes_no_tensor_of_keys(load: Load) -> None:
    """Each layer's keys lie where they lay."""
    policy = load()
    recording(policy)
    decoder = Decoder(dataclasses.replace(policy, eos_token_ids=()))
    prompts = encode_prompts(policy, make_samples())
    handles = [decoder.admit(p, 3, SamplingParams(max_new_tokens=TOKENS, seed=1)) for p in prompts]
    places = set()
    for step in range(TOKENS - 1):
        decoder.step()
        [batch] = decoder._batches
        if step > 0:
            places.add(tuple(layer.keys.data_ptr() for layer in batch._layers))
    decoder.step()
    assert len(places) == 1
    assert all(len(decoder.take(handle).completions[0].token_ids) == TOKENS for handle in handles)


def test_a_batch_that_is_done_is_gone_with_its_keys_at_once(load: Load) -> None:
    """And not when the garbage collector comes by: until then no memory of a device could be given back."""
    policy = load()
    recorder = recording(policy)
    decoder = Decoder(dataclasses.replace(policy, eos_token_ids=()))
    gc.collect()
    gc.disable()
    try:
        for prompt in encode_prompts(policy, make_samples()):
            decoder.admit(prompt, 3, SamplingParams(max_new_tokens=TOKENS, seed=1))
        for _ in range(4):
            decoder.step()
        held = [weakref.ref(batch) for batch in decoder._batches]
        held += [weakref.ref(layer.keys) for batch in decoder._batches for layer in batch._layers]
        decoder.drain()
        assert [each() for each in held] == [None] * len(held)
    finally:
        gc.enable()
    assert recorder.replays > 0


def test_what_cannot_be_recorded_goes_step_by_step(load: Load) -> None:
    policy = load()
    expected = decode_groups(Decoder(policy), requests(policy))
    recorder = recording(policy, refuses=True)
    assert_same(decode_groups(Decoder(policy), requests(policy)), expected)
    assert recorder.captures > 0


@pytest.mark.parametrize("names", [[BASE, "default", "other"], ["default"] * 3, [BASE] * 3])
def test_recorded_steps_go_through_each_row_s_own_adapter(load: Load, names: list[str]) -> None:
    """Also while others are put on the model and taken off: what a replay reads of the rows is not made anew."""
    policy = load()
    add_adapter(policy, LoraSection(r=4, alpha=12), seed=0)
    train_a_little(policy)
    policy.model.add_adapter("other", policy.model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".other." in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    prompts = encode_prompts(policy, make_samples())
    endless = dataclasses.replace(policy, eos_token_ids=())
    sampling = SamplingParams(max_new_tokens=TOKENS, greedy=True)

    def decoded(names: list[str], refreshed: bool = False) -> list[list[int]]:
        rows = RowAdapters(policy)
        decoder = Decoder(endless, adapters=rows)
        handles = [decoder.admit(p, 1, sampling, adapter=name) for p, name in zip(prompts, names, strict=True)]
        while not decoder.idle:
            decoder.step()
            if refreshed:
                rows.refresh()
        return [ids(decoder.take(handle).completions[0]) for handle in handles]

    expected = decoded(names)
    alone = [decoded([name] * 3)[i] for i, name in enumerate(names)]
    assert expected == alone
    if len(set(names)) > 1:
        assert all(alone[i] != decoded([BASE] * 3)[i] for i in (1, 2)), "the adapters are felt"
    recorder = recording(endless)
    for refreshed in (False, True):
        assert decoded(names, refreshed) == expected
    assert (recorder.captures, recorder.replays) == (2, 2 * (TOKENS - 2))


def test_what_recorded_steps_read_of_the_rows_stays_while_they_are_replayed(load: Load) -> None:
    policy = load()
    add_adapter(policy, LoraSection(r=4, alpha=12), seed=0)
    recording(policy)
    rows = RowAdapters(policy)
    decoder = Decoder(dataclasses.replace(policy, eos_token_ids=()), adapters=rows)
    names = [BASE, "default", "default"]
    for prompt, name in zip(encode_prompts(policy, make_samples()), names, strict=True):
        decoder.admit(prompt, 1, SamplingParams(max_new_tokens=TOKENS), adapter=name)
    for _ in range(2):  # the stand-in keeps all that a recorded step reads: this is before it records one
        decoder.step()
    [(_, index)] = rows.rows_of(names)
    of_these = weakref.ref(index)
    del index
    rows.refresh()
    assert of_these() is not None
    decoder.drain()
    gc.collect()
    assert of_these() is None
