"""The engine without Ray: answers as Hugging Face gives them, coming and going, limits, and what goes wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
import torch

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import (
    ConfigError,
    ContextLengthError,
    DataError,
    ImageError,
    ModelError,
    OverloadedError,
    ServingError,
    UnknownModelError,
)
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams
from mmrl_ray.policy import prompt_pool
from mmrl_ray.policy.generation.decode import Decoder
from mmrl_ray.policy.generation.queue import GroupBook
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import PER_TOKEN, encode_prompts
from mmrl_ray.serving.decode_thread import DecodeThread, Ticket
from mmrl_ray.serving.engine import Engine, export_engine_metrics
from mmrl_ray.serving.protocols import Delta, Generated, GenerateRequest, Served, Turn
from tests.support.meters import MemoryMeter
from tests.support.tiny_models import FAMILIES, build_family, image_bytes

DEADLINE_S = 60.0
PROMPT = "describe the image ."


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(family: str = "llava") -> Path:
        if family not in made:
            made[family] = build_family(family, tmp_path_factory.mktemp(family))
        return made[family]

    return find


def load(path: Path) -> Policy:
    return load_policy(ModelSection(path=str(path), dtype="float32"), device="cpu")


class Starter(Protocol):
    """Starts an engine that answers as a policy; tests/vllm has one of its own."""

    decoder: type[GroupBook]
    """What decodes in it."""

    def __call__(self, policy: Policy, **settings: Any) -> AbstractContextManager[Engine]: ...


@contextmanager
def running(policy: Policy, **settings: Any) -> Iterator[Engine]:
    values = {"vision_cache_bytes": 1 << 22, "max_rows": 16, "max_queue": 32, "timeout_s": DEADLINE_S, **settings}
    engine = Engine(policy, None, model_id="tiny", created=5, **values)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


class _Local:
    decoder = Decoder

    def __call__(self, policy: Policy, **settings: Any) -> AbstractContextManager[Engine]:
        return running(policy, **settings)


@pytest.fixture
def started() -> Starter:
    return _Local()


@pytest.fixture
def policy(folder: Callable[..., Path]) -> Policy:
    return load(folder())


def ask(
    picture: int = 0,
    *,
    n: int = 1,
    tokens: int = 10,
    prompt: str = PROMPT,
    size: tuple[int, int] = (64, 64),
    **sampling: Any,
) -> GenerateRequest:
    """About a picture of its own."""
    params = {"greedy": True, "max_new_tokens": tokens, **sampling}
    turns = (Turn("user", (0, prompt)),)
    return GenerateRequest(
        f"r{picture}", "tiny", turns, (image_bytes(*size, seed=picture),), SamplingParams(**params), n
    )


def by_transformers(policy: Policy, request: GenerateRequest) -> list[int]:
    """Greedy tokens by Hugging Face `generate`, on the one prompt alone."""
    text = request.turns[0].parts[1]
    assert isinstance(text, str)
    [prompt] = encode_prompts(policy, [Sample("s", request.images, text)])
    inputs = {n: value[None] if n in PER_TOKEN else value for n, value in prompt.model_inputs.items()}
    if policy.hf_model.config.model_type in ("llava", "internvl", "smolvlm"):
        inputs.pop("mm_token_type_ids", None)
    ids = prompt.input_ids[None]
    out = policy.hf_model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        suppress_tokens=[*policy.image_token_ids, *(policy.hf_model.generation_config.suppress_tokens or ())],
        eos_token_id=list(policy.eos_token_ids),
        pad_token_id=policy.pad_token_id,
        max_new_tokens=request.sampling.max_new_tokens,
        **inputs,
    )
    return out[0, ids.shape[1] :].tolist()


def run(work: Awaitable[Any]) -> Any:
    async def within() -> Any:
        return await asyncio.wait_for(work, DEADLINE_S)

    return asyncio.run(within())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


def tokens_of(made: Generated, choice: int = 0) -> list[int]:
    return [token.token_id for token in made.choices[choice].tokens]


async def read(stream: AsyncIterator[Served | Delta]) -> tuple[Served, list[Delta]]:
    items = [item async for item in stream]
    assert isinstance(items[0], Served)
    return items[0], [item for item in items[1:] if isinstance(item, Delta)]


class Gate:
    """Holds the decode thread at a step until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, decoder: type[GroupBook] = Decoder) -> None:
        self._open = threading.Event()
        step, submit = decoder.step, DecodeThread.submit
        self.reached = threading.Event()
        self.submitted = 0

        def held(made: GroupBook, *args: Any) -> Any:
            self.reached.set()
            assert self._open.wait(DEADLINE_S)
            return step(made, *args)

        def counted(thread: DecodeThread, ticket: Ticket) -> None:
            submit(thread, ticket)
            self.submitted += 1

        monkeypatch.setattr(decoder, "step", held)
        monkeypatch.setattr(DecodeThread, "submit", counted)

    def open(self) -> None:
        self._open.set()


# -- what is answered --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_what_generate_gives_alone_and_under_load(
    family: str, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, started: Starter
) -> None:
    policy = load(folder(family))
    sizes = ((64, 64), (96, 64), (64, 128))
    requests = [ask(i, tokens=6 + i % 4, size=sizes[i % 3], prompt=PROMPT * (1 + i % 2)) for i in range(8)]
    expected = [by_transformers(policy, request) for request in requests]

    async def work(engine: Engine) -> None:
        alone = await engine.generate(requests[0])
        assert tokens_of(alone) == expected[0]
        gate = Gate(monkeypatch, started.decoder)
        # Some come while others run, some sample, some are streamed, some are given up.
        others = [asyncio.create_task(engine.generate(ask(90 + i, n=3, greedy=False, seed=i))) for i in range(3)]
        first = [asyncio.create_task(engine.generate(request)) for request in requests[:4]]
        await until(lambda: gate.submitted == len(others) + len(first))
        gate.open()
        await until(lambda: engine.stats()["running_requests"] > 0)
        others.pop().cancel()
        second = [asyncio.create_task(engine.generate(request)) for request in requests[4:]]
        _, deltas = await read(engine.stream(requests[1]))
        assert [token.token_id for delta in deltas for token in delta.tokens] == expected[1]
        assert [tokens_of(made) for made in await asyncio.gather(*first, *second)] == expected
        await asyncio.gather(*others)

    with started(policy) as engine:
        meter = MemoryMeter(model="base")
        export_engine_metrics(meter, engine.stats)
        run(work(engine))
        stats = engine.stats()
        (look,) = meter.watched
        look()
        look()  # counts nothing twice
    assert meter.values["policy_requests", "base"] == stats["requests"] == 13
    assert meter.values["policy_sampled_tokens", "base"] == stats["tokens"]
    assert meter.values["policy_vision_lookups", "base", "hit"] == stats["vision_cache_hits"]
    assert meter.values["policy_running_rows", "base"] == 0
    assert stats["decode_passes"] < sum(len(tokens) for tokens in expected), "requests share passes"
    assert stats["images_encoded"] >= 8
    assert stats["vision_cache_hits"] >= 1


RULES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "reward for repetition": {"repetition_penalty": 0.6},
    "n-grams": {"no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": "SAID", "begin_suppress_tokens": [12, 13]},
    "bad words": {"bad_words_ids": "SAID", "sequence_bias": [[[14], 2.5], [[15, 16], -3.0]]},
    "long": {"min_new_tokens": 5},
    "long with its prompt": {"min_length": 22},
    "ends": {"forced_eos_token_id": 2, "exponential_decay_length_penalty": [2, 1.5]},
    "all": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [20, 21], "min_new_tokens": 4},
}


@pytest.mark.parametrize(("name", "family"), [*((name, "llava") for name in RULES), ("all", "qwen2_5_vl")])
def test_a_checkpoints_rules_of_generation_are_obeyed_as_generate_obeys_them(
    name: str,
    family: str,
    folder: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    started: Starter,
) -> None:
    """Prompts of several lengths in one batch, and neighbours that sample; one request names its own length."""
    place = Path(shutil.copytree(folder(family), tmp_path / family))
    file = place / "generation_config.json"
    sizes = ((64, 64), (96, 64), (64, 128))
    requests = [
        ask(i, tokens=8 + i % 3, size=sizes[i % 3], prompt=PROMPT * (1 + i % 2), min_new_tokens=None) for i in range(5)
    ]
    plain = load(place)
    third = by_transformers(plain, requests[0])[2]  # by itself this model ends nothing
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [*plain.eos_token_ids, third]}))
    plain = load(place)
    without = [by_transformers(plain, request) for request in requests]
    assert len(without[0]) == 3
    said = sorted({token for tokens in without for token in tokens[:4]} - set(plain.eos_token_ids))[:4]
    rules = {key: value if value != "SAID" else said for key, value in RULES[name].items()}
    if "bad_words_ids" in rules:
        rules["bad_words_ids"] = [[said[0]], said[1:3]]
    file.write_text(json.dumps({**json.loads(file.read_text()), **rules, "num_beams": 1, "guidance_scale": 1.5}))
    policy = load(place)
    asked = policy.hf_model.generation_config
    assert asked.guidance_scale == 1.5
    with caplog.at_level("INFO", logger="mmrl_ray"), started(policy, max_rows=9) as engine:
        asked.guidance_scale = None  # what is not obeyed is left out of the oracle, too
        expected = [by_transformers(policy, request) for request in requests]
        assert expected != without, "the rules are felt"
        ruled = dataclasses.replace(
            requests[0], n=3, sampling=dataclasses.replace(requests[0].sampling, min_new_tokens=0)
        )

        async def work() -> list[Generated]:
            neighbours = [asyncio.create_task(engine.generate(ask(70 + i, n=2, greedy=False))) for i in range(2)]
            made = await asyncio.gather(*(engine.generate(request) for request in [*requests, ruled]))
            await asyncio.gather(*neighbours)
            return made

        *answers, own_length = run(work())
        assert [tokens_of(made) for made in answers] == expected
        asked.min_length, asked.min_new_tokens = None, None
        assert [tokens_of(own_length, i) for i in range(3)] == [by_transformers(policy, requests[0])] * 3
    found = [record for record in caplog.records if "generation_config.json asks for" in record.message]
    assert len(found) == 2, "what is obeyed, and what is not"
    assert "guidance_scale=1.5, which is not obeyed" in found[0].message
    assert all(f"{key}=" in found[1].message for key in rules)
    assert "num_beams" not in caplog.text


def test_a_rule_that_is_none_is_an_error_before_anything_is_served(policy: Policy) -> None:
    policy.hf_model.generation_config.repetition_penalty = -2.0
    with pytest.raises(ModelError, match=r"repetition_penalty=-2\.0\) cannot be obeyed"):
        Engine(policy, None, model_id="tiny", created=5, vision_cache_bytes=1, max_rows=1, max_queue=1, timeout_s=1)


def test_an_answer_is_whole(policy: Policy, started: Starter) -> None:
    with started(policy) as engine:
        request = ask(n=3, greedy=False, seed=4, temperature=1.5, tokens=12)
        made = run(engine.generate(request))
        again = run(engine.generate(request))
        models = run(engine.models())
        assert run(engine.ready())
    assert made == again, "a seed decides"
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert len({choice.text for choice in made.choices}) > 1
    [prompt] = encode_prompts(policy, [Sample("s", request.images, PROMPT)])
    assert made.served == Served("tiny", 0, prompt.input_ids.numel())
    for choice in made.choices:
        ids = [token.token_id for token in choice.tokens]
        assert choice.text == policy.tokenizer.decode(ids, skip_special_tokens=True)
        assert choice.finish_reason == ("stop" if ids[-1] in policy.eos_token_ids else "length")
        assert all(token.logprob <= 0 for token in choice.tokens)
        texts = [policy.tokenizer.decode([i], skip_special_tokens=True) for i in ids]
        assert [token.text for token in choice.tokens] == texts
    assert [(m.id, m.created, m.root, m.parent, m.version) for m in models] == [("tiny", 5, "tiny", None, 0)]
    assert not run(engine.ready())


def test_a_stream_adds_up_to_the_answer(policy: Policy, started: Starter) -> None:
    async def work(engine: Engine) -> None:
        free = (await engine.generate(ask(greedy=False, seed=1, temperature=2.0))).choices[0].text
        stop = free[len(free) // 2 : len(free) // 2 + 4]
        for request in (ask(n=3, greedy=False, seed=2), ask(greedy=False, seed=1, temperature=2.0, stop=(stop,))):
            whole = await engine.generate(request)
            served, deltas = await read(engine.stream(request))
            assert served == whole.served
            for choice in whole.choices:
                mine = [delta for delta in deltas if delta.index == choice.index]
                assert "".join(delta.text for delta in mine) == choice.text
                assert sum((delta.tokens for delta in mine), ()) == choice.tokens
                assert [delta.finish_reason for delta in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
                assert stop not in choice.text or request.sampling.stop == ()

    with started(policy) as engine:
        run(work(engine))


def test_steps_that_nobody_has_read_come_as_one_delta(policy: Policy, started: Starter) -> None:
    async def work(engine: Engine) -> None:
        stream = engine.stream(ask(tokens=40))
        assert isinstance(await anext(stream), Served)
        await until(lambda: engine.stats()["tokens"] >= 20)
        rest = [item async for item in stream]
        assert len(rest) < 30
        assert sum(len(item.tokens) for item in rest if isinstance(item, Delta)) == 40

    policy.eos_token_ids = (policy.vocab_size - 1,)
    with started(policy) as engine:
        run(work(engine))


# -- coming and going --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_who_goes_away_frees_their_rows(policy: Policy, streamed: bool, started: Starter) -> None:
    policy.eos_token_ids = (policy.vocab_size - 1,)

    async def work(engine: Engine) -> None:
        long = ask(n=4, tokens=400)
        if streamed:
            stream = engine.stream(long)
            await anext(stream)
            await anext(stream)
            assert engine.stats()["running_rows"] == 4
            await stream.aclose()
        else:
            task = asyncio.create_task(engine.generate(long))
            await until(lambda: engine.stats()["running_rows"] == 4)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: engine.stats()["running_rows"] == 0)
        stats = engine.stats()
        assert stats["tokens"] < 4 * 400
        assert (stats["running_requests"], stats["waiting_requests"]) == (0, 0)
        assert len(tokens_of(await engine.generate(ask(tokens=3)))) == 3

    with started(policy, max_rows=4) as engine:
        run(work(engine))


def test_a_full_queue_refuses_at_once(policy: Policy, monkeypatch: pytest.MonkeyPatch, started: Starter) -> None:
    with started(policy, max_queue=2) as engine:
        gate = Gate(monkeypatch, started.decoder)

        async def work() -> None:
            tasks = [asyncio.create_task(engine.generate(ask(i))) for i in range(2)]
            await until(lambda: engine.stats()["waiting_requests"] == 2)
            with pytest.raises(OverloadedError, match="2 requests are waiting already"):
                await engine.generate(ask(2))
            with pytest.raises(OverloadedError):
                await anext(engine.stream(ask(2)))
            gate.open()
            assert len(await asyncio.gather(*tasks)) == 2
            await engine.generate(ask(3))

        run(work())


def test_one_caller_cannot_fill_the_queue(policy: Policy, monkeypatch: pytest.MonkeyPatch, started: Starter) -> None:
    def of(caller: str, picture: int) -> GenerateRequest:
        return dataclasses.replace(ask(picture, n=4, tokens=30, greedy=False), caller=caller)

    with started(policy, max_queue=16) as engine:
        gate = Gate(monkeypatch, started.decoder)

        async def work() -> None:
            many = [asyncio.create_task(engine.generate(of("a", i))) for i in range(12)]
            await until(lambda: engine.stats()["waiting_requests"] == 12)
            with pytest.raises(OverloadedError, match="12 requests of this key are waiting already"):
                await engine.generate(of("a", 12))
            other = asyncio.create_task(engine.generate(of("b", 13)))
            await until(lambda: engine.stats()["waiting_requests"] == 13)
            gate.open()
            await other
            assert sum(task.done() for task in many) < 9, "so many would have to end before, first come, first served"
            await asyncio.gather(*many)

        run(work())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_that_takes_too_long_ends(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, streamed: bool, started: Starter
) -> None:
    with started(policy, timeout_s=0.3) as engine:
        gate = Gate(monkeypatch, started.decoder)

        async def work() -> None:
            with pytest.raises(ServingError, match=r"did not finish within 0\.3 s"):
                await (read(engine.stream(ask())) if streamed else engine.generate(ask()))
            gate.open()
            await until(lambda: engine.stats()["running_rows"] == 0)
            assert engine.stats()["waiting_requests"] == 0

        run(work())


def test_a_stream_begins_with_its_first_token(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, started: Starter
) -> None:
    with started(policy) as engine:
        gate = Gate(monkeypatch, started.decoder)

        async def work() -> None:
            stream = engine.stream(ask())
            first = asyncio.ensure_future(anext(stream))
            await until(gate.reached.is_set)
            await asyncio.sleep(0.05)
            assert not first.done(), "what goes wrong until then can still be the answer"
            gate.open()
            assert isinstance(await first, Served)
            assert isinstance(await anext(stream), Delta)
            await stream.aclose()

        run(work())


def test_the_model_alone_computes_with_all_threads(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, set[int]] = {"model": set(), "prompts": set()}
    policy.hf_model.register_forward_pre_hook(lambda *_: found["model"].add(torch.get_num_threads()))
    encode = prompt_pool.encode_conversation

    def seen(*args: Any, **kwargs: Any) -> Any:
        found["prompts"].add(torch.get_num_threads())
        return encode(*args, **kwargs)

    before = torch.get_num_threads()
    with running(policy, threads=3) as engine:
        monkeypatch.setattr(prompt_pool, "encode_conversation", seen)
        run(engine.generate(ask()))
    torch.set_num_threads(before)  # of threads that are yet to come
    assert found == {"model": {3}, "prompts": {1}}


def test_before_and_after_nothing_is_answered(policy: Policy) -> None:
    values = {"vision_cache_bytes": 0, "max_rows": 4, "max_queue": 4, "timeout_s": 1.0}
    engine = Engine(policy, None, model_id="tiny", created=0, **values)
    assert not run(engine.ready())
    with pytest.raises(OverloadedError, match="not ready"):
        run(engine.generate(ask()))
    engine.start()
    engine.close()
    assert not engine.healthy
    with pytest.raises(OverloadedError, match="not ready"):
        run(engine.generate(ask()))


def test_closing_answers_those_who_wait(policy: Policy, monkeypatch: pytest.MonkeyPatch, started: Starter) -> None:
    with started(policy) as engine:
        gate = Gate(monkeypatch, started.decoder)

        async def work() -> None:
            task = asyncio.create_task(engine.generate(ask(tokens=50)))
            await until(gate.reached.is_set)
            closing = asyncio.get_running_loop().run_in_executor(None, engine.close)
            gate.open()
            with pytest.raises(ServingError, match="shutting down"):
                await task
            await closing

        policy.eos_token_ids = (policy.vocab_size - 1,)
        run(work())


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompt": "a <image> b"}, DataError),
        ({"prompt": "a \udcff"}, DataError),
        ({"tokens": 100_000}, ContextLengthError),
        ({"tokens": 0}, ConfigError),
        ({"temperature": float("nan")}, ConfigError),
        ({"n": 17}, ConfigError),
        ({"n": 0}, ConfigError),
    ],
)
def test_a_request_that_cannot_be_answered_says_so(
    policy: Policy, change: dict[str, Any], error: type, started: Starter
) -> None:
    with started(policy) as engine:
        for streamed in (False, True):
            with pytest.raises(error):
                run(read(engine.stream(ask(**change))) if streamed else engine.generate(ask(**change)))
        request = ask()
        with pytest.raises(UnknownModelError, match="no model 'other'"):
            run(engine.generate(GenerateRequest("r", "other", request.turns, request.images, request.sampling)))
        with pytest.raises(ImageError):
            run(engine.generate(GenerateRequest("r", "tiny", request.turns, (b"x",), request.sampling)))
        with pytest.raises(DataError, match="no image"):
            run(engine.generate(GenerateRequest("r", "tiny", (Turn("user", ("a",)),), (), request.sampling)))
        assert run(engine.generate(request)).choices[0].text
        assert engine.stats()["waiting_requests"] == 0


def test_the_decode_thread_goes_on_while_a_picture_is_prepared(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, started: Starter
) -> None:
    """A process that takes ever so long over a picture holds up its own request alone; errors are as ever."""
    policy = load(folder("qwen2_5_vl"))
    requests = [ask(i, tokens=20) for i in range(2)]
    expected = [by_transformers(policy, request) for request in requests]
    before = workers()
    with started(policy, prompt_processes=1) as engine:
        (encoder,) = workers() - before
        gate = Gate(monkeypatch, started.decoder)

        async def work() -> None:
            first = asyncio.create_task(engine.generate(requests[0]))
            await until(lambda: gate.submitted == 1)
            psutil.Process(encoder).suspend()
            second = asyncio.create_task(engine.generate(requests[1]))
            await until(lambda: engine.stats()["waiting_requests"] == 2)
            gate.open()
            assert tokens_of(await first) == expected[0]
            assert gate.submitted == 1
            assert not second.done()
            psutil.Process(encoder).resume()
            assert tokens_of(await second) == expected[1]

        run(work())
        request = requests[0]
        for wrong, error in (
            (dataclasses.replace(request, images=(b"x",)), ImageError),
            (dataclasses.replace(request, images=(image_bytes()[:100],)), ImageError),
            (dataclasses.replace(request, turns=(Turn("user", ("a",)),), images=()), DataError),
            (dataclasses.replace(request, turns=(Turn("user", (0, "<|image_pad|>")),)), DataError),
            (ask(tokens=100_000), ContextLengthError),
        ):
            with pytest.raises(error):
                run(engine.generate(wrong))
        psutil.Process(encoder).kill()
        assert tokens_of(run(engine.generate(request))) == expected[0], "another process takes its place"


def workers() -> set[int]:
    """Processes of this one's children that do the work: those without children."""
    return {child.pid for child in psutil.Process().children(recursive=True) if not child.children()}


def test_a_prompt_that_fails_in_the_model_fails_alone(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, started: Starter
) -> None:
    encode = prompt_pool.encode_conversation

    def poison(policy: Policy, turns: Any, images: Any, pictures: Any) -> EncodedPrompt:
        prompt = encode(policy, turns, images, pictures)
        if "circle" in str(turns):
            prompt.input_ids[prompt.input_ids == policy.placeholder_id] = 7  # no place for the features
        return prompt

    expected = [by_transformers(policy, ask(i)) for i in range(3)]
    with started(policy) as engine:
        monkeypatch.setattr(prompt_pool, "encode_conversation", poison)
        gate = Gate(monkeypatch, started.decoder)

        async def work() -> list[Any]:
            bad = engine.generate(ask(8, prompt="a circle"))
            tasks = [
                asyncio.create_task(work)
                for work in (engine.generate(ask(0)), bad, *map(engine.generate, map(ask, (1, 2))))
            ]
            await until(lambda: engine.stats()["waiting_requests"] == 4)
            gate.open()
            return await asyncio.gather(*tasks, return_exceptions=True)

        first, bad, *others = run(work())
        assert isinstance(bad, ServingError)
        assert [tokens_of(made) for made in (first, *others)] == expected
        assert engine.stats()["failed_requests"] == 1
        assert engine.healthy


def test_a_pass_that_fails_ends_its_rows_and_the_loop_goes_on(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, started: Starter
) -> None:
    expected = by_transformers(policy, ask())
    with started(policy) as engine:
        core = policy.core
        forward = core.forward
        left = [3]

        def fail_once(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("out of memory in /secret/path")
            return forward(*args, **kwargs)

        fail_once.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(core, "forward", fail_once)
        with pytest.raises(ServingError, match=r"failed on this request \(RuntimeError\)") as raised:
            run(engine.generate(ask()))
        assert "secret" not in str(raised.value)
        assert tokens_of(run(engine.generate(ask()))) == expected


def test_a_loop_beyond_repair_starts_anew(policy: Policy, monkeypatch: pytest.MonkeyPatch, started: Starter) -> None:
    with started(policy) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "_settle", lambda self, freed=None: 1 / 0)
            with pytest.raises(ServingError, match="ZeroDivisionError"):
                run(engine.generate(ask()))
        assert tokens_of(run(engine.generate(ask()))) == by_transformers(policy, ask())
        assert engine.healthy


def test_an_accelerator_that_is_gone_makes_the_engine_unhealthy(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, started: Starter
) -> None:
    def gone(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with started(policy) as engine:
        monkeypatch.setattr(Decoder, "_start", gone)
        with pytest.raises(ServingError):
            run(engine.generate(ask()))
        assert not engine.healthy
        assert not run(engine.ready())
