"""The served policy with vLLM behind it: the tests of the local engine, and its own."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_ray.config.sections import LoraSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, OverloadedError, UnknownModelError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy.generation.queue import GroupBook
from mmrl_ray.policy.generation.vllm.decoder import VllmDecoder, VllmServer
from mmrl_ray.policy.heads import save_value_heads
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import add_adapter, save_adapter
from mmrl_ray.policy.lora.pool import AdapterPool
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.serving.adapters import AdapterFolders
from mmrl_ray.serving.engine import Engine
from mmrl_ray.serving.protocols import Generated
from tests.support.tiny_models import section_of
from tests.unit.serving import test_engine as of_base
from tests.unit.serving import test_engine_adapters as of_adapters
from tests.unit.serving.test_engine import (  # noqa: F401
    ask,
    by_transformers,
    run,
    test_a_full_queue_refuses_at_once,
    test_a_request_that_cannot_be_answered_says_so,
    test_a_request_that_takes_too_long_ends,
    test_a_stream_adds_up_to_the_answer,
    test_a_stream_begins_with_its_first_token,
    test_an_answer_is_whole,
    test_closing_answers_those_who_wait,
    test_one_caller_cannot_fill_the_queue,
    test_steps_that_nobody_has_read_come_as_one_delta,
    test_who_goes_away_frees_their_rows,
    tokens_of,
    until,
)
from tests.unit.serving.test_engine_adapters import (  # noqa: F401
    save,
    test_a_new_version_that_is_broken_leaves_the_old_one,
    test_a_row_that_runs_keeps_its_version,
    test_a_swap_fails_no_request_and_mixes_none,
    test_an_adapter_that_never_worked_is_refused_and_not_listed,
    test_more_adapters_than_fit_take_turns,
    test_requests_of_several_adapters_run_together,
    trained,
    with_values,
)
from tests.vllm.conftest import PLACES, RANK, SERVED_S, begun, endless

BOUND = 1e-3
"""Nats, in float32."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def policy(base: Path) -> Policy:
    """The model itself, for what is expected."""
    return endless(load_policy(section_of("llava", base), device="cpu"))


class Starter:
    """That of `test_engine` and that of `test_engine_adapters`: the second names folders of adapters."""

    decoder: type[GroupBook] = VllmDecoder

    def __init__(self, server: VllmServer) -> None:
        self._server = server

    def __call__(
        self,
        model: Policy | Path,
        adapters: Mapping[str, Path | str] | None = None,
        folders: tuple[str, ...] = (),
        **settings: Any,
    ) -> AbstractContextManager[Engine]:
        sources = None
        if adapters is not None:
            sources = AdapterFolders({id: str(folder) for id, folder in adapters.items()}, folders)
        return running(self._server, sources, **settings)


@contextmanager
def running(
    server: VllmServer, sources: AdapterFolders | None = None, *, max_adapters: int = PLACES, **settings: Any
) -> Iterator[Engine]:
    pool = None
    if sources is not None:
        pool = AdapterPool(server.policy, sources, max_adapters=max_adapters, max_rank=RANK, host=server)
    values = {"vision_cache_bytes": 0, "max_rows": 16, "max_queue": 32, "timeout_s": SERVED_S, **settings}
    engine = Engine(server.policy, pool, model_id="tiny", created=5, vllm=server, **values)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()
        for name in [*server.adapters]:
            server.take_off(name)


@pytest.fixture
def started(server: VllmServer) -> Starter:
    return Starter(server)


# -- its answers -------------------------------------------------------------------------------------------------------


def test_greedy_answers_and_log_probs_are_those_of_the_local_engine(started: Starter, policy: Policy) -> None:
    sizes = ((64, 64), (96, 64), (64, 128))
    asked = [ask(i, tokens=6 + i % 4, size=sizes[i % 3], prompt=of_base.PROMPT * (1 + i % 2)) for i in range(6)]
    again = dataclasses.replace(asked[0], n=3)

    async def answers(engine: Engine) -> list[Generated]:
        return await asyncio.gather(*(engine.generate(request) for request in [*asked, again]))

    with of_base.running(policy) as local:
        expected = run(answers(local))
    with started(policy) as engine:
        found = run(answers(engine))
    assert [tokens_of(made) for made in found] == [tokens_of(made) for made in expected]
    assert [tokens_of(made) for made in found[:-1]] == [by_transformers(policy, request) for request in asked]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.served == theirs.served
        for one, other in zip(mine.choices, theirs.choices, strict=True):
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            gaps = [abs(a.logprob - b.logprob) for a, b in zip(one.tokens, other.tokens, strict=True)]
            assert max(gaps) < BOUND


def test_log_probs_are_of_the_filtered_distribution_that_was_drawn_from(started: Starter, policy: Policy) -> None:
    temperature, top_k, top_p = 1.3, 20, 0.8
    request = ask(greedy=False, n=4, tokens=8, seed=7, temperature=temperature, top_k=top_k, top_p=top_p)
    with started(policy) as engine:
        made = run(engine.generate(request))
    (prompt,) = encode_prompts(policy, [Sample("s", request.images, of_base.PROMPT)])
    assert len({choice.text for choice in made.choices}) > 1
    for choice in made.choices:
        said = [token.token_id for token in choice.tokens]
        ids = torch.cat([prompt.input_ids, torch.tensor(said)])[None]
        pixels = prompt.model_inputs["pixel_values"]
        with torch.no_grad():
            logits = policy.hf_model(input_ids=ids, pixel_values=pixels).logits[0, -len(said) - 1 : -1].double()
        logits[:, list(policy.image_token_ids)] = -torch.inf
        for token, row in zip(choice.tokens, logits / temperature, strict=True):
            kept = row.topk(top_k)
            chances = kept.values.softmax(0)
            among = int((chances.cumsum(0) - chances < top_p).sum())
            assert token.token_id in kept.indices[:among].tolist()
            place = kept.indices.tolist().index(token.token_id)
            assert abs(token.logprob - float((chances[place] / chances[:among].sum()).log())) < BOUND


def test_a_checkpoints_rules_are_obeyed_and_an_engine_that_hangs_is_lost(
    base: Path, tmp_path: Path, python: str
) -> None:
    place = Path(shutil.copytree(base, tmp_path / "ruled"))
    file = place / "generation_config.json"
    rules = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "suppress_tokens": [20, 21]}
    plain = endless(load_policy(section_of("llava", base), device="cpu"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **rules}))
    policy = endless(load_policy(section_of("llava", place), device="cpu"))
    asked = [ask(i, tokens=8 + i, min_new_tokens=None) for i in range(3)]
    expected = [by_transformers(policy, request) for request in asked]
    assert expected != [by_transformers(plain, request) for request in asked], "the rules are felt"
    made = begun(place, python, adapters=None, timeout_s=3.0)
    with running(made) as engine:

        async def work() -> None:
            answers = await asyncio.gather(*(engine.generate(request) for request in asked))
            assert [tokens_of(answer) for answer in answers] == expected
            stream = engine.stream(ask(tokens=400))
            await anext(stream)
            os.kill(made.process.facts["pid"], signal.SIGSTOP)
            with pytest.raises(OverloadedError, match="another one takes its place"):
                async for _ in stream:
                    pass
            assert not engine.healthy, "whoever looks after it puts another one in its place"
            with pytest.raises(OverloadedError, match="not ready"):
                await engine.generate(ask())

        run(work())


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_versions_beyond_the_places_wait_and_hold_up_nobody_else(
    started: Starter,
    base: Path,
    trained: Callable[[int], Policy],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Each version is held by a stream; there are places for one more than there may be adapters."""
    policies = [trained(seed) for seed in range(1, PLACES + 3)]
    folder = tmp_path / "one"

    async def work(engine: Engine) -> None:
        streams = []
        for policy in policies[: PLACES + 1]:
            save(policy, folder)
            await engine.refresh()
            streams.append(engine.stream(of_adapters.ask("one", tokens=450)))
            await anext(streams[-1])
        save(policies[PLACES + 1], folder)
        await engine.refresh()
        waits = asyncio.create_task(engine.generate(of_adapters.ask("one")))
        await until(lambda: engine.stats()["waiting_requests"] == 1)
        for _ in range(2):
            assert len(tokens_of(await engine.generate(of_adapters.ask("tiny")))) == 12
        assert not waits.done()
        await streams[0].aclose()
        assert tokens_of(await waits) == of_adapters.says(policies[PLACES + 1])
        for stream in streams[1:]:
            await stream.aclose()

    with started(base, {"one": save(policies[0], folder)}) as engine:
        run(work(engine))


def test_a_base_beside_adapters_in_every_place_stays_itself(
    started: Starter,
    base: Path,
    trained: Callable[[int], Policy],  # noqa: F811
    tmp_path: Path,
) -> None:
    """On CPUs vLLM's own products give a row without an adapter that of the last place."""
    folders = {f"a{seed}": save(trained(seed), tmp_path / f"a{seed}") for seed in range(1, PLACES + 2)}
    plain = endless(load_policy(section_of("llava", base), device="cpu"))

    async def work(engine: Engine) -> None:
        streams = [engine.stream(of_adapters.ask(id, tokens=450)) for id in folders]
        for stream in streams:
            await anext(stream)
        assert tokens_of(await engine.generate(of_adapters.ask("tiny"))) == of_adapters.says(plain)
        for stream in streams:
            await stream.aclose()

    with started(base, folders, max_adapters=PLACES + 1) as engine:
        run(work(engine))


def test_what_vllm_cannot_do_is_refused_and_said(
    started: Starter,
    base: Path,
    trained: Callable[[int], Policy],  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    valued = with_values(trained(1), 1, 2.0)
    save_adapter(valued.model, tmp_path / "valued")
    save_value_heads(valued.value_heads[None], tmp_path / "valued", whole=True)
    seeing = load_policy(section_of("llava", base), device="cpu")
    add_adapter(seeing, LoraSection(r=2, targets=r".*vision_tower.*q_proj", adapt_vision=True), seed=0)
    save_adapter(seeing.model, tmp_path / "seeing")
    save_adapter(trained(2).model, tmp_path / "sound")

    async def work(engine: Engine) -> None:
        for id in ("valued", "seeing"):
            with pytest.raises(UnknownModelError, match=f"'{id}' of step 0 cannot be used"):
                await engine.generate(of_adapters.ask(id))
        assert [model.id for model in await engine.models()] == ["tiny", "sound"]
        assert tokens_of(await engine.generate(of_adapters.ask("sound"))) == of_adapters.says(trained(2))
        with pytest.raises(ConfigError, match=r"temperature=0\.005: the vLLM engine draws at 0\.01 to 2"):
            await engine.generate(ask(greedy=False, temperature=0.005))

    with caplog.at_level("WARNING", logger="mmrl_ray"), started(base, {}, (str(tmp_path),)) as engine:
        run(work(engine))
    assert "decoded by value heads (beta=2), which the vLLM engine cannot do" in caplog.text
    assert "no place for" in caplog.text


def test_seeds_are_those_of_a_request_and_its_choices(started: Starter, policy: Policy) -> None:
    """Choice 1 of seed 3 is not choice 0 of seed 4, as it would be if vLLM counted."""
    sampling = SamplingParams(max_new_tokens=10, seed=2**64 - 3, temperature=1.5)
    request = dataclasses.replace(ask(n=2), sampling=sampling)
    following = dataclasses.replace(request, sampling=dataclasses.replace(sampling, seed=2**64 - 2))
    with started(policy) as engine:
        first, again, next_one = (run(engine.generate(each)) for each in (request, request, following))
    assert first == again
    texts = [choice.text for made in (first, next_one) for choice in made.choices]
    assert len(set(texts)) == len(texts)
