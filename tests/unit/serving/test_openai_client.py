"""The official OpenAI client against a real server over fakes: what it sends works, what goes wrong has its type."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from mmrl_ray.config.serving import LimitsSection, RateSection, ServingSection
from mmrl_ray.errors import OverloadedError
from mmrl_ray.serving.app import GatewayDeps, make_app
from mmrl_ray.serving.keys import KeyStore
from mmrl_ray.serving.protocols import Choice, Generated, Served, TokenInfo
from tests.support.fake_services import ADAPTER, ADAPTER_STEP, BASE, PROMPT_TOKENS, FakePolicy, png, running_gateway

DATA_URI = "data:image/png;base64," + base64.b64encode(png()).decode()
MESSAGES: list[Any] = [
    {"role": "system", "content": "be terse"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "what is"},
            {"type": "image_url", "image_url": {"url": DATA_URI, "detail": "low"}},
            {"type": "text", "text": "here?"},
        ],
    },
]
TEXT = "a red square on blue {}"


class Server:
    def __init__(self, url: str, store: KeyStore, policy: FakePolicy) -> None:
        self.url, self.store, self.policy = f"{url}/v1", store, policy
        self.client = self.connect(store.create("test", ["infer"])[0])

    def connect(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0)

    def ask(self, **options: Any) -> Any:
        return self.client.chat.completions.create(**{"model": BASE, "messages": MESSAGES, **options})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    policy = FakePolicy()
    store = KeyStore(f"sqlite:///{tmp_path_factory.mktemp('keys')}/keys.db")
    app = make_app(GatewayDeps(policy, None, store, ServingSection()))
    with running_gateway(app) as url:
        yield Server(url, store, policy)
    store.close()


@pytest.fixture(autouse=True)
def fresh(server: Server) -> Iterator[None]:
    server.policy.requests.clear()
    yield
    server.policy.error = server.policy.fail_after = None


def test_a_conversation_with_an_image_reaches_the_policy_as_it_was_written(server: Server) -> None:
    answer = server.ask(model=ADAPTER, seed=5, temperature=0.5, top_p=0.9, stop=["."], max_tokens=9, n=2)
    assert answer.object == "chat.completion"
    assert answer.model == ADAPTER
    assert answer.system_fingerprint == f"{ADAPTER}@{ADAPTER_STEP}"
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == [TEXT.format(0), TEXT.format(1)]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (PROMPT_TOKENS, 12, 19)
    (asked,) = server.policy.requests
    assert asked.id == answer.id
    assert [(turn.role, turn.parts) for turn in asked.turns] == [
        ("system", ("be terse",)),
        ("user", ("what is", 0, "here?")),
    ]
    assert asked.images == (png(),)
    assert asked.n == 2
    sampling = asked.sampling
    assert (sampling.seed, sampling.temperature, sampling.top_p) == (5, 0.5, 0.9)
    assert (sampling.stop, sampling.max_new_tokens, sampling.greedy) == ((".",), 9, False)


def test_what_is_left_out_is_what_openai_takes_for_it(server: Server) -> None:
    server.ask()
    server.ask()
    first, second = (asked.sampling for asked in server.policy.requests)
    assert (first.temperature, first.top_p, first.top_k, first.stop, first.greedy) == (1.0, 1.0, 0, (), False)
    assert first.max_new_tokens == LimitsSection().default_max_tokens
    assert first.seed != second.seed, "a request without a seed gets one of its own"


def test_temperature_0_is_greedy(server: Server) -> None:
    server.ask(temperature=0)
    server.ask(temperature=1e-9)
    server.ask(top_p=0)
    server.ask(temperature=0.01)
    assert [asked.sampling.greedy for asked in server.policy.requests] == [True, True, True, False]
    assert all(asked.sampling.temperature > 0 for asked in server.policy.requests)
    assert all(0 < asked.sampling.top_p <= 1 for asked in server.policy.requests)


def test_both_names_of_the_token_limit_and_either_form_of_stop(server: Server) -> None:
    assert server.ask(max_completion_tokens=2).choices[0].finish_reason == "length"
    assert server.ask(max_tokens=2, max_completion_tokens=2).choices[0].message.content == "a red"
    assert server.ask(stop=" on").choices[0].message.content == "a red square"
    server.ask(seed=-3)
    assert server.policy.requests[-1].sampling.seed == 2**64 - 3


def test_logprobs(server: Server) -> None:
    content = server.ask(logprobs=True, max_tokens=2).choices[0].logprobs.content
    assert [(token.token, token.logprob) for token in content] == [("a", -0.5), (" red", -1.0)]
    assert bytes(content[1].bytes) == b" red"
    assert content[0].top_logprobs == []
    assert server.ask().choices[0].logprobs is None


def test_the_bytes_of_tokens_that_are_parts_of_a_character(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [TokenInfo("\\xc3", 1, -1.0, b"\xc3"), TokenInfo("\\xa9", 2, -1.0, b"\xa9")]

    async def generate(self: FakePolicy, request: Any) -> Generated:
        return Generated(Served(BASE, 0, 1), (Choice(0, "é", "stop", tuple(parts)),))

    monkeypatch.setattr(FakePolicy, "generate", generate)
    choice = server.ask(logprobs=True).choices[0]
    assert b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode() == choice.message.content


def test_parameters_that_change_nothing_are_taken(server: Server) -> None:
    server.ask(
        user="me", metadata={"a": "b"}, store=False, service_tier="auto", frequency_penalty=0, presence_penalty=0.0,
        logit_bias={}, tools=[], tool_choice="none", response_format={"type": "text"}, top_logprobs=0,
        parallel_tool_calls=True, seed=None, stop=[], n=None, safety_identifier="x", extra_body={"top_k": 5},
    )  # fmt: skip
    assert server.policy.requests[0].sampling.top_k == 5


@pytest.mark.parametrize("as_message", [lambda m: m, lambda m: m.model_dump()])
def test_an_answer_goes_into_the_history_as_it_came(server: Server, as_message: Any) -> None:
    said = as_message(server.ask().choices[0].message)
    detailed = {"type": "image_url", "image_url": {"url": DATA_URI, "detail": "original"}}
    server.ask(messages=[*MESSAGES, said, {"role": "user", "content": [detailed]}])
    assert [(turn.role, turn.parts) for turn in server.policy.requests[1].turns[2:]] == [
        ("assistant", (TEXT.format(0),)),
        ("user", (1,)),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: this parameter is not served here"),
        ({"temperature": 3}, "temperature: must be at most 2, not 3"),
        ({"n": 1.5}, "n: must be an integer, not 1.5"),
        ({"stop": [3]}, "stop[0]: must be a string, not 3"),
        ({"stream": "yes"}, "stream: must be true or false, not 'yes'"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: must be 'text', not 'json_object'"),
        ({"extra_body": {"skip_special_tokens": False}}, "skip_special_tokens: must be true, not false"),
        ({"extra_body": {"ignore_eos": True}}, "ignore_eos: must be false, not true"),
        ({"messages": []}, "messages: must have at least 1 items, not 0"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: this parameter is required"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(server: Server, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(**options)
    assert message in caught.value.body["message"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"top_logprobs": 2, "logprobs": True}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"stop": [3]}, "stop[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 65}, "messages"),
        ({"extra_body": {"max_token": 5}}, "max_token"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty"),
        ({"extra_body": {"skip_special_tokens": False}}, "skip_special_tokens"),
    ],
)
def test_what_cannot_be_served_is_a_bad_request_that_names_it(
    server: Server, options: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(**options)
    assert caught.value.param == param
    assert isinstance(caught.value.code, str)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    assert server.policy.requests == []


def test_too_many_images_are_refused_before_one_is_decoded(server: Server) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError, match="10,000 images is above 4") as caught:
        server.ask(messages=[{"role": "user", "content": [broken] * 10_000}])
    assert caught.value.code == "above_limit"
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(messages=[*MESSAGES, {"role": "user", "content": [{"type": "text", "text": "and"}, broken]}])
    assert (caught.value.code, caught.value.param) == ("invalid_image", "messages[2].content[1].image_url.url")


def test_images_by_url_are_off(server: Server) -> None:
    url = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(openai.BadRequestError, match="URL are off") as caught:
        server.ask(messages=[{"role": "user", "content": [url]}])
    assert caught.value.code == "invalid_image"


def test_models(server: Server) -> None:
    listed = server.client.models.list().data
    assert [model.id for model in listed] == [BASE, ADAPTER]
    model = server.client.models.retrieve(ADAPTER)
    assert model.model_dump(exclude_unset=True) == {
        "id": ADAPTER, "object": "model", "created": 1_800_000_000, "owned_by": "mmrl_ray", "root": BASE,
        "parent": BASE, "step": ADAPTER_STEP,
    }  # fmt: skip
    assert listed[1] == model
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


def test_typed_exceptions(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        server.connect("mmrl-" + "x" * 43).models.list()
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        server.connect(server.store.create("f", ["feedback"])[0]).models.list()
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as unknown:
            server.ask(model="nobody", stream=stream)
        assert unknown.value.code == "model_not_found"
        assert unknown.value.param == "model"
    server.policy.error = OverloadedError("full")
    with pytest.raises(openai.InternalServerError) as busy:
        server.ask()
    assert busy.value.status_code == 503
    assert busy.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.InternalServerError):
        server.ask(stream=True)


def test_a_client_that_retries_gets_through(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    served = FakePolicy.generate
    failures = [OverloadedError("full"), OverloadedError("full")]

    async def sometimes(self: FakePolicy, request: Any) -> Any:
        if failures:
            raise failures.pop()
        return await served(self, request)

    monkeypatch.setattr(FakePolicy, "generate", sometimes)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    answer = server.client.with_options(max_retries=2).chat.completions.create(model=BASE, messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT.format(0)


def test_rate_limit_error(tmp_path: Path) -> None:
    store = KeyStore(f"sqlite:///{tmp_path}/keys.db")
    settings = ServingSection(rate=RateSection(requests_per_minute=1.0, burst=1))
    with running_gateway(make_app(GatewayDeps(FakePolicy(), None, store, settings))) as url:
        server = Server(url, store, FakePolicy())
        server.client.models.list()
        with pytest.raises(openai.RateLimitError) as caught:
            server.client.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) > 30


def test_a_stream_says_what_the_whole_answer_says(server: Server) -> None:
    with server.client.chat.completions.stream(
        model=ADAPTER, messages=MESSAGES, n=2, logprobs=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        streamed = stream.get_final_completion()
    whole = server.ask(model=ADAPTER, n=2, logprobs=True)
    for mine, theirs in zip(streamed.choices, whole.choices, strict=True):
        assert (mine.message.content, mine.finish_reason) == (theirs.message.content, theirs.finish_reason)
        assert mine.logprobs is not None
        assert [t.model_dump() for t in mine.logprobs.content] == [t.model_dump() for t in theirs.logprobs.content]
    assert streamed.usage == whole.usage
    assert (streamed.model, streamed.system_fingerprint) == (whole.model, whole.system_fingerprint)
    assert {chunk.id for chunk in chunks} == {server.policy.requests[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_the_events_of_a_stream(server: Server) -> None:
    response = server.client.chat.completions.with_raw_response.create(
        model=ADAPTER, messages=MESSAGES, max_tokens=2, stream=True, stream_options={"include_usage": True}
    ).http_response
    lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-model-version"] == str(ADAPTER_STEP)
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    deltas = [(event["choices"][0]["delta"], event["choices"][0]["finish_reason"]) for event in events[:-1]]
    assert deltas == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "a"}, None),
        ({"content": " red"}, None),
        ({}, "length"),
    ]
    assert [event["usage"] for event in events[:-1]] == [None] * 4
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


def test_usage_is_only_told_when_asked_for(server: Server) -> None:
    chunks = list(server.ask(stream=True))
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("error", "message"), [(OverloadedError("full"), "full"), (RuntimeError("secret"), "log")])
def test_a_stream_that_breaks_is_an_error_and_no_short_answer(server: Server, error: Exception, message: str) -> None:
    server.policy.error, server.policy.fail_after = error, 2
    seen = []
    with pytest.raises(openai.APIError, match=message) as caught:
        seen.extend(server.ask(stream=True))
    assert [chunk.choices[0].delta.content for chunk in seen] == ["", "a", " red"]
    assert "secret" not in str(caught.value)
