"""The decode loop itself: admission, seeds, cancelling, text, what it refuses, and caches it cannot merge."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch

from mmrl_ray.errors import ConfigError, ContextLengthError, ModelError
from mmrl_ray.experience.carriers import Completion, EncodedPrompt, SamplingParams
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, Event, GroupOutput, decode_groups
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import VisionCache, vision_features
from tests.support.tiny_models import make_samples

Load = Callable[..., Policy]
SAMPLED = SamplingParams(max_new_tokens=10, temperature=1.2, seed=7)
GREEDY = SamplingParams(max_new_tokens=10, greedy=True)


@pytest.fixture
def policy(load: Load) -> Policy:
    policy = load()
    policy.eos_token_ids = (*policy.eos_token_ids, 9)  # about one token in thirty ends a row
    return policy


@pytest.fixture
def prompts(policy: Policy) -> list[EncodedPrompt]:
    return encode_prompts(policy, make_samples())


def ids(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions]


def same(a: GroupOutput, b: GroupOutput) -> bool:
    """Bit for bit."""
    return all(
        torch.equal(x.token_ids, y.token_ids) and torch.equal(x.logprobs, y.logprobs) and x.text == y.text
        for x, y in zip(a.completions, b.completions, strict=True)
    )


def bias_logits(policy: Policy, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Lets `change` have the logits of everything that the model's head is asked."""
    policy.hf_model.get_output_embeddings().register_forward_hook(lambda module, args, output: change(output))


# -- seeds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [None, False])
def test_the_same_calls_give_the_same_bits(policy: Policy, prompts: list[EncodedPrompt], packed: bool | None) -> None:
    def run() -> list[GroupOutput]:
        decoder = Decoder(policy, packed=packed, max_rows=12)
        requests = [
            DecodeRequest(p, 4, dataclasses.replace(SAMPLED, seed=i), greedy_extra=True)
            for i, p in enumerate([*prompts, *prompts])
        ]
        return decode_groups(decoder, requests)

    first, second = run(), run()
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    # Another seed gives something else, the greedy rows excepted.
    assert ids(first[0].completions) != ids(first[3].completions)
    assert first[0].greedy is not None
    assert first[3].greedy is not None
    assert ids([first[0].greedy]) == ids([first[3].greedy])


def test_neighbours_order_and_group_size_do_not_change_what_a_row_draws(
    policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    alone = decode_groups(Decoder(policy), [DecodeRequest(prompts[1], 4, SAMPLED)])[0]
    others = [DecodeRequest(prompts[0], 3, GREEDY), DecodeRequest(prompts[2], 2, dataclasses.replace(SAMPLED, seed=1))]
    for requests in (
        [*others, DecodeRequest(prompts[1], 6, SAMPLED)],
        [DecodeRequest(prompts[1], 6, SAMPLED), *others],
    ):
        outs = decode_groups(Decoder(policy), requests)
        among = next(out for r, out in zip(requests, outs, strict=True) if r.n == 6)
        assert ids(among.completions)[:4] == ids(alone.completions)
    assert len({tuple(row) for row in ids(alone.completions)}) > 1


def test_what_waits_for_rows_draws_the_same(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    requests = [DecodeRequest(p, 3, SAMPLED) for p in prompts]
    together = decode_groups(Decoder(policy), requests)
    decoder = Decoder(policy, max_rows=4)
    in_turn = decode_groups(decoder, requests)
    assert decoder.counters["prefills"] == 3
    assert [ids(o.completions) for o in in_turn] == [ids(o.completions) for o in together]


# -- callers -------------------------------------------------------------------------------------------------------


def test_nobody_waits_for_a_caller_with_many_groups(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    long = dataclasses.replace(SAMPLED, max_new_tokens=40)
    decoder = Decoder(policy, max_rows=16)
    many = [decoder.admit(prompts[i % 3], 4, dataclasses.replace(long, seed=i), caller="a") for i in range(20)]
    decoder.step()
    assert decoder.running_rows <= 12, "some rows are left for others"
    [alone] = decode_groups(Decoder(policy), [DecodeRequest(prompts[1], 2, SAMPLED)])
    late = decoder.admit(prompts[1], 2, SAMPLED, caller="b")
    steps: Counter[str] = Counter()
    while decoder.unfinished(late):
        found = {"b" if event.handle == late else "a" for event in decoder.step()}
        steps.update(found)
    tokens = max(len(completion.token_ids) for completion in alone.completions)
    assert steps["b"] == tokens, "a token at each step that it has a part in"
    assert 0 < steps["a"] < tokens, "a pass of twelve rows costs more than one of two"
    assert ids(decoder.take(late).completions) == ids(alone.completions)
    decoder.drain()
    assert all(len(decoder.take(handle).completions) == 4 for handle in many)


def test_a_large_group_is_not_kept_out_by_small_ones(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    decoder = Decoder(policy, max_rows=8)
    for i in range(6):
        decoder.admit(prompts[0], 1, dataclasses.replace(GREEDY, max_new_tokens=4 + i), caller="a")
    decoder.step()
    large = decoder.admit(prompts[1], 8, GREEDY, caller="b")
    later = [decoder.admit(prompts[0], 1, GREEDY, caller="a") for _ in range(20)]
    events: list[Event] = []
    while not any(event.handle == large for event in events):
        events = decoder.step()
        assert not any(event.handle in later for event in events)


def test_callers_with_groups_of_all_rows_take_turns(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    decoder, order = Decoder(policy, max_rows=4), dict[int, str]()
    callers = {decoder.admit(prompts[0], 4, GREEDY, caller=caller): caller for caller in "aaaabc"}
    while not decoder.idle:
        order |= {event.handle: callers[event.handle] for event in decoder.step()}
    assert "".join(order.values()) == "abcaaa"


def test_who_leaves_before_the_first_token_pays_for_the_prompts(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    prompt, decoder, steps = prompts[0], Decoder(policy), 0
    stays = decoder.admit(prompt, 1, dataclasses.replace(GREEDY, max_new_tokens=64), caller="b")
    while decoder.unfinished(stays):
        leaving = decoder.admit(prompt, 1, GREEDY, caller="a")
        decoder.step()
        steps += 1
        decoder.cancel(leaving)
    a_prompt_in_steps = prompt.input_ids.numel() / 9
    assert steps > 10 * a_prompt_in_steps
    assert 3 < decoder.counters["prompts"] <= 3 + steps / a_prompt_in_steps
    alone = decoder.admit(prompt, 1, GREEDY, caller="a")
    assert any(event.handle == alone for event in decoder.step()), "who is alone owes nobody anything"


def test_light_callers_share_passes(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    decoder = Decoder(policy)
    for i in range(12):
        decoder.admit(prompts[i % 3], 1, GREEDY, caller=f"caller {i}")
        decoder.step()
    decoder.drain()
    tokens = sum(len(decoder.take(handle).completions[0].token_ids) for handle in range(12))
    assert decoder.counters["passes"] < tokens / 3


def test_one_caller_is_served_as_if_nobody_asked_who(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    def run(caller: str | None) -> tuple[list[Event], list[GroupOutput]]:
        decoder, events = Decoder(policy, max_rows=40), []
        for i in range(9):
            decoder.admit(prompts[i % 3], 1 + i % 4, dataclasses.replace(SAMPLED, seed=i), caller=caller)
            events += decoder.step() if i % 2 else []
        while not decoder.idle:
            events += decoder.step()
        return events, [decoder.take(handle) for handle in range(9)]

    named, unnamed = run("a"), run(None)
    assert named[0] == unnamed[0]
    assert all(same(a, b) for a, b in zip(named[1], unnamed[1], strict=True))


# -- what may be sampled -------------------------------------------------------------------------------------------


def test_image_tokens_are_never_emitted(load: Load) -> None:
    policy = load("qwen2_5_vl")
    forbidden = list(policy.image_token_ids)
    assert len(forbidden) > 1

    def tempt(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., forbidden] = 1e4
        return logits

    bias_logits(policy, tempt)
    prompts = encode_prompts(policy, make_samples())
    requests = [
        DecodeRequest(p, 20, dataclasses.replace(SAMPLED, top_k=k), greedy_extra=True) for k, p in enumerate(prompts)
    ]
    for out in decode_groups(Decoder(policy), requests):
        assert out.greedy is not None
        for completion in (*out.completions, out.greedy):
            assert not set(completion.token_ids.tolist()) & set(forbidden)
            assert bool(completion.logprobs.isfinite().all())


def test_filters_reach_the_rows_they_are_meant_for(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    narrow = dataclasses.replace(SAMPLED, top_k=1)
    outs = decode_groups(Decoder(policy), [DecodeRequest(prompts[0], 3, p) for p in (SAMPLED, narrow, GREEDY)])
    assert ids(outs[1].completions) == ids(outs[2].completions)
    assert all(c.logprobs.eq(0).all() for c in outs[1].completions)
    assert ids(outs[0].completions) != ids(outs[2].completions)


def test_nan_logits_are_an_error(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    decoder = Decoder(policy)
    decoder.admit(prompts[0], 2, SAMPLED)
    decoder.step()
    bias_logits(policy, lambda logits: logits * float("nan"))
    with pytest.raises(ModelError, match="NaN at token 1"):
        decoder.step()


# -- coming and going ----------------------------------------------------------------------------------------------


def test_groups_start_in_order_when_there_are_rows(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    policy.eos_token_ids = policy.eos_token_ids[:1]
    decoder = Decoder(policy, max_rows=4)
    big = decoder.admit(prompts[0], 3, dataclasses.replace(GREEDY, max_new_tokens=2))
    wide = decoder.admit(prompts[1], 2, dataclasses.replace(GREEDY, max_new_tokens=2))
    small = decoder.admit(prompts[2], 1, dataclasses.replace(GREEDY, max_new_tokens=2))
    seen = [sorted({event.handle for event in decoder.step()}) for _ in range(4)]
    # `small` would have fitted beside `big`, but waits its turn.
    assert seen == [[big], [big], [wide, small], [wide, small]]
    assert decoder.idle


def test_prompts_are_encoded_within_the_token_budget(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    requests = [DecodeRequest(p, 2, GREEDY) for p in prompts]
    whole, split = Decoder(policy), Decoder(policy, prefill_tokens=40)
    expected = [ids(out.completions) for out in decode_groups(whole, requests)]
    assert [ids(out.completions) for out in decode_groups(split, requests)] == expected
    # 17 + 17 tokens fit, 3 × 24 do not.
    assert (whole.counters["prefills"], split.counters["prefills"]) == (1, 2)
    assert split.counters["merges"] == 1


def test_cancelling_frees_rows_at_once(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    policy.eos_token_ids = policy.eos_token_ids[:1]
    decoder = Decoder(policy, max_rows=5)
    stays = decoder.admit(prompts[0], 1, GREEDY)
    goes = decoder.admit(prompts[1], 4, SAMPLED)
    waits = decoder.admit(prompts[2], 2, SAMPLED)
    decoder.step()
    decoder.step()
    assert (decoder.running_rows, decoder.waiting) == (5, 1)
    partial = decoder.cancel(goes)
    assert [c.finish_reason for c in partial.completions] == ["cancelled"] * 4
    assert [c.token_ids.numel() for c in partial.completions] == [2] * 4
    assert decoder.running_rows == 1
    assert {event.handle for event in decoder.step()} == {stays, waits}
    with pytest.raises(KeyError):
        decoder.cancel(goes)
    decoder.cancel(stays)
    decoder.cancel(waits)
    assert decoder.idle
    assert decoder.step() == []


def test_what_is_cancelled_before_it_starts_is_empty(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    decoder = Decoder(policy)
    out = decoder.cancel(decoder.admit(prompts[0], 2, SAMPLED, greedy_extra=True))
    assert out.greedy is not None
    assert [c.token_ids.numel() for c in (*out.completions, out.greedy)] == [0, 0, 0]
    assert out.vision is None
    assert decoder.idle


def test_a_batch_holds_no_more_keys_than_its_rows_see(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    policy.eos_token_ids = policy.eos_token_ids[:1]
    decoder = Decoder(policy)
    short = dataclasses.replace(GREEDY, max_new_tokens=6)
    shortest = prompts[0].input_ids.numel()
    decoder.admit(prompts[2], 1, short)
    # A row is always running, but none for long: without trimming the keys would grow with every step.
    for _ in range(12):
        decoder.step()
        decoder.step()
        decoder.admit(prompts[0], 1, short)
    decoder.drain()
    handle = decoder.admit(prompts[0], 1, short)
    for _ in range(5):
        decoder.step()
        assert max(decode_batch.keys for decode_batch in decoder._batches) <= shortest + 6
    decoder.step()
    assert decoder.take(handle).completions[0].token_ids.numel() == 6


def test_long_lived_traffic_does_not_grow_the_cache(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    policy.eos_token_ids = policy.eos_token_ids[:1]
    decoder = Decoder(policy)
    short = dataclasses.replace(GREEDY, max_new_tokens=6)
    longest = max(prompt.input_ids.numel() for prompt in prompts)
    widths = []
    for i in range(40):
        decoder.admit(prompts[i % 3], 1, short)
        decoder.step()
        widths.append(max(decode_batch.keys for decode_batch in decoder._batches))
    assert len(decoder._batches) == 1
    assert max(widths) <= longest + 3 * 6


def test_a_prompt_that_cannot_be_encoded_takes_only_its_own_batch_down(
    policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    decoder = Decoder(policy)
    good = decoder.admit(prompts[0], 1, GREEDY)
    decoder.step()
    broken = dataclasses.replace(prompts[1], model_inputs={})
    bad = decoder.admit(broken, 1, GREEDY)
    with pytest.raises(ModelError):
        decoder.step()
    assert decoder.unfinished(bad) == 0
    decoder.drain()
    expected = decode_groups(Decoder(policy), [DecodeRequest(prompts[0], 1, GREEDY)])[0]
    assert ids(decoder.take(good).completions) == ids(expected.completions)


def test_what_started_beside_a_prompt_that_failed_goes_on(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    expected = decode_groups(Decoder(policy), [DecodeRequest(prompts[0], 2, SAMPLED)])[0]
    decoder = Decoder(policy, prefill_tokens=40)
    first = decoder.admit(prompts[1], 3, SAMPLED)
    good = decoder.admit(prompts[0], 2, SAMPLED)
    decoder.admit(dataclasses.replace(prompts[2], model_inputs={}), 1, SAMPLED)
    with pytest.raises(ModelError):
        decoder.step()
    # Encoded, but without a token yet.
    decoder.cancel(first)
    decoder.drain()
    assert ids(decoder.take(good).completions) == ids(expected.completions)


def test_an_error_leaves_nothing_of_the_requests_behind(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    decoder = Decoder(policy)
    with pytest.raises(ConfigError):
        decode_groups(decoder, [DecodeRequest(prompts[0], 2, SAMPLED), DecodeRequest(prompts[1], 0, SAMPLED)])
    assert decoder.idle


def test_taking_too_early_or_twice_is_refused(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    decoder = Decoder(policy)
    handle = decoder.admit(prompts[0], 1, GREEDY)
    decoder.step()
    with pytest.raises(ValueError, match="1 unfinished"):
        decoder.take(handle)
    decoder.drain()
    decoder.take(handle)
    with pytest.raises(KeyError):
        decoder.take(handle)


@pytest.mark.parametrize(
    ("n", "sampling", "message"),
    [
        (0, SAMPLED, "n=0"),
        (9, SAMPLED, "max_rows=8"),
        (1, dataclasses.replace(SAMPLED, temperature=-1.0), "temperature"),
    ],
)
def test_requests_out_of_range_are_refused(
    policy: Policy, prompts: list[EncodedPrompt], n: int, sampling: SamplingParams, message: str
) -> None:
    decoder = Decoder(policy, max_rows=8)
    with pytest.raises(ConfigError, match=message):
        decoder.admit(prompts[0], n, sampling)
    assert decoder.idle


def test_a_completion_that_may_outgrow_the_context_is_refused(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    with pytest.raises(ContextLengthError):
        Decoder(policy).admit(prompts[0], 1, dataclasses.replace(SAMPLED, max_new_tokens=policy.context_length))


# -- vision features -----------------------------------------------------------------------------------------------


def test_features_come_from_the_caller_or_the_cache_and_are_handed_on(
    policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    cache = VisionCache(1 << 20)
    given = vision_features(policy, prompts[:1])[0]
    decoder = Decoder(policy, vision_cache=cache)
    requests = [DecodeRequest(prompts[0], 1, GREEDY, features=given), DecodeRequest(prompts[1], 1, GREEDY)]
    outs = decode_groups(decoder, requests)
    assert outs[0].vision is given
    assert (cache.hits, cache.misses, len(cache)) == (0, 1, 1)
    again = decode_groups(decoder, requests)
    assert again[1].vision is outs[1].vision
    assert (cache.hits, cache.misses) == (1, 1)
    # They are what a learner can put into a forward with gradient.
    assert outs[1].vision is not None
    assert not outs[1].vision.tokens.is_inference()


# -- events and text -----------------------------------------------------------------------------------------------


def run_events(decoder: Decoder) -> list[Event]:
    events = []
    while not decoder.idle:
        events += decoder.step()
    return events


def test_events_are_the_completions_token_by_token(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    decoder = Decoder(policy)
    streamed = decoder.admit(prompts[0], 3, SAMPLED, greedy_extra=True, stream=True)
    silent = decoder.admit(prompts[1], 2, SAMPLED)
    events = run_events(decoder)
    for handle in (streamed, silent):
        out = decoder.take(handle)
        rows = [*out.completions, *([out.greedy] if out.greedy else [])]
        for i, completion in enumerate(rows):
            mine = [event for event in events if (event.handle, event.row) == (handle, i)]
            assert [event.token_id for event in mine] == completion.token_ids.tolist()
            assert torch.equal(torch.tensor([event.logprob for event in mine]), completion.logprobs)
            assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]
            assert "".join(event.text for event in mine) == (completion.text if handle == streamed else "")
            decoded = policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            assert completion.text == decoded


WORDY = SamplingParams(max_new_tokens=10, temperature=5.0, seed=3)


def free_text(policy: Policy, prompt: EncodedPrompt) -> Completion:
    """Ten words, most of them different, that no stop string ends."""
    policy.eos_token_ids = policy.eos_token_ids[:1]
    completion = decode_groups(Decoder(policy), [DecodeRequest(prompt, 1, WORDY)])[0].completions[0]
    assert len(set(completion.token_ids.tolist())) > 6
    return completion


def test_a_stop_string_ends_a_row_and_is_cut_off(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    free = free_text(policy, prompts[0])
    # Begins within one word and ends within the next.
    space = free.text.index(" ", 12)
    stop = free.text[space - 2 : space + 2]
    at = free.text.index(stop)
    decoder = Decoder(policy)
    handle = decoder.admit(prompts[0], 1, dataclasses.replace(WORDY, stop=("nowhere", stop)), stream=True)
    texts = [event.text for event in run_events(decoder)]
    got = decoder.take(handle).completions[0]
    assert got.finish_reason == "stop"
    assert got.text == free.text[:at] == "".join(texts)
    count = got.token_ids.numel()
    assert torch.equal(got.token_ids, free.token_ids[:count])
    assert stop in policy.tokenizer.decode(got.token_ids)
    assert stop not in policy.tokenizer.decode(got.token_ids[:-1])


def test_text_held_back_for_a_stop_string_is_reported_in_the_end(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    free = free_text(policy, prompts[0])
    almost = free.text[-9:] + " and on"
    decoder = Decoder(policy)
    handle = decoder.admit(prompts[0], 1, dataclasses.replace(WORDY, stop=(almost,)), stream=True)
    events = run_events(decoder)
    assert "".join(event.text for event in events) == decoder.take(handle).completions[0].text == free.text
    assert "".join(event.text for event in events[:-1]) == free.text[:-9]


# -- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_rows_with_a_prompt_of_their_own(load: Load, attention: str) -> None:
    policy = load(attn_implementation=attention)
    policy.eos_token_ids = (*policy.eos_token_ids, 9, 12)
    prompts = encode_prompts(policy, make_samples())
    requests = [DecodeRequest(p, n, SAMPLED, greedy_extra=True) for p, n in zip(prompts, (2, 5, 3), strict=True)]
    packed, apart = (decode_groups(Decoder(policy, packed=p), requests) for p in (None, False))
    for a, b in zip(packed, apart, strict=True):
        assert ids(a.completions) == ids(b.completions)
        for x, y in zip(a.completions, b.completions, strict=True):
            torch.testing.assert_close(x.logprobs, y.logprobs, rtol=0, atol=1e-5)


def test_batches_of_very_different_width_stay_apart(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    policy.eos_token_ids = policy.eos_token_ids[:1]
    decoder = Decoder(policy)
    decoder.admit(prompts[0], 8, SAMPLED)
    decoder.step()
    decoder.admit(prompts[1], 1, SAMPLED)  # would carry seven empty slots
    decoder.step()
    assert len(decoder._batches) == 2
    decoder.admit(prompts[2], 2, SAMPLED)
    decoder.step()
    assert len(decoder._batches) == 2
    assert decoder.counters["merges"] == 1


def test_rows_under_a_sliding_window_decode_apart_and_are_counted(load: Load) -> None:
    policy = load("gemma3")
    prompts = encode_prompts(policy, make_samples())
    decoder = Decoder(policy)
    decoder.admit(prompts[0], 2, SAMPLED)
    decoder.step()
    decoder.admit(prompts[1], 2, SAMPLED)
    decoder.step()
    assert len(decoder._batches) == 2
    assert decoder.counters["unmerged_rows"] == 4
    decoder.step()
    assert decoder.counters["passes"] == 1 + 2


def test_a_sliding_window_that_nobody_outgrows_is_no_hindrance(load: Load) -> None:
    policy = load("gemma3")
    text = policy.hf_model.config.get_text_config()
    text.sliding_window = 64
    for layer in policy.decoder.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 64
    prompts = encode_prompts(policy, make_samples())
    requests = [DecodeRequest(p, 3, SAMPLED) for p in prompts]
    packed, apart = Decoder(policy), Decoder(policy, packed=False)
    outs = decode_groups(packed, requests)
    assert packed.counters["unmerged_rows"] == 0
    assert [ids(o.completions) for o in outs] == [ids(o.completions) for o in decode_groups(apart, requests)]
    longer = Decoder(policy)
    longer.admit(prompts[0], 1, dataclasses.replace(SAMPLED, max_new_tokens=60))
    longer.step()
    assert longer.counters["unmerged_rows"] == 1
