"""Captions, rewards and scores through the gateway, over fakes; and what strangers send instead."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mmrl_ray.config.serving import LimitsSection, ServingSection
from mmrl_ray.errors import RewardError
from mmrl_ray.serving.app import GatewayDeps, make_app
from tests.support.fake_services import ADAPTER, ADAPTER_STEP, BASE, FakePolicy, FakeReward, png

PNG, OTHER = png(), png((0, 0, 250))
SHA = hashlib.sha256(PNG).hexdigest()
LIMITS = LimitsSection(max_n=4, max_images=2, max_captions=6, max_references=3, max_text_chars=50, max_tokens=100)


def data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def image_part(picture: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(picture)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


class Gateway:
    def __init__(self, **options: Any) -> None:
        self.policy, self.reward = FakePolicy(), FakeReward()
        deps = {"reward": self.reward, "keys": None, "settings": ServingSection(limits=LIMITS), "insecure": True}
        app = make_app(GatewayDeps(self.policy, **{**deps, **options}))
        self.client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)

    def post(self, path: str, body: Any) -> Any:
        return self.client.post(path, json=body)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


def refused(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


# -- captions ----------------------------------------------------------------------------------------------------------


def test_a_file_is_enough(gateway: Gateway) -> None:
    response = gateway.client.post("/v1/captions", files={"image": ("photo.jpg", PNG, "image/jpeg")})
    answer = response.json()
    assert response.headers["x-model-version"] == "0"
    assert (answer["object"], answer["model"], answer["version"]) == ("caption", BASE, 0)
    assert answer["image_hash"] == SHA
    assert answer["captions"] == [
        {"index": 0, "text": "a red square on blue 0", "finish_reason": "stop", "logprob": -0.5 * 21}
    ]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    (asked,) = gateway.policy.requests
    assert asked.images == (PNG,)
    assert [(turn.role, turn.parts) for turn in asked.turns] == [("user", (0, "Describe the image."))]
    assert asked.sampling.greedy


def test_form_and_json_ask_for_the_same(gateway: Gateway) -> None:
    fields = {"model": ADAPTER, "prompt": "what?", "n": 3, "max_tokens": 2, "seed": 9, "top_p": 0.5, "stop": "x"}
    form = gateway.client.post("/v1/captions", data={k: str(v) for k, v in fields.items()}, files={"image": PNG})
    written = gateway.post("/v1/captions", {**fields, "image": data_uri(PNG)})
    assert {**form.json(), "id": 0, "created": 0} == {**written.json(), "id": 0, "created": 0}
    first, second = gateway.policy.requests
    assert (first.model, first.turns, first.images, first.sampling, first.n) == (
        second.model, second.turns, second.images, second.sampling, second.n
    )  # fmt: skip
    assert first.turns[0].parts == (0, "what?")
    assert (first.sampling.seed, first.sampling.top_p, first.sampling.temperature) == (9, 0.5, 1.0)
    assert form.json()["version"] == ADAPTER_STEP
    assert [caption["finish_reason"] for caption in form.json()["captions"]] == ["length"] * 3


def test_several_captions_are_drawn_and_one_is_the_likeliest(gateway: Gateway) -> None:
    for n, temperature in ((1, None), (2, None), (1, 0.7), (2, 0)):
        gateway.post("/v1/captions", {"image": data_uri(PNG), "n": n, "temperature": temperature})
    assert [asked.sampling.greedy for asked in gateway.policy.requests] == [True, False, False, True]


def test_the_servers_own_prompt_and_model() -> None:
    gateway = Gateway(prompt="say it .", default_model=ADAPTER)
    assert gateway.client.post("/v1/captions", files={"image": PNG}).json()["model"] == ADAPTER
    assert gateway.policy.requests[0].turns[0].parts == (0, "say it .")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "image"),
        ({"image": None}, "image"),
        ({"image": "hello"}, "image"),
        ({"image": "data:image/png;base64,AAAA"}, "image"),
        ({"n": 5}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": "2"}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"prompt": "x" * 51}, "prompt"),
        ({"stop": ["x" * 51]}, "stop"),
        ({"colour": 1}, "colour"),
    ],
)
def test_captions_that_cannot_be_made(gateway: Gateway, body: dict[str, Any], param: str | None) -> None:
    given = body if "image" in body or not body else {"image": data_uri(PNG), **body}
    assert refused(gateway.post("/v1/captions", given))["param"] == param
    assert gateway.policy.requests == []


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({}, {"photo": PNG}, "image"),
        ({}, [("image", PNG), ("image", PNG)], "image"),
        ({"n": "many"}, {"image": PNG}, "n"),
        ({"temperature": "nan"}, {"image": PNG}, "temperature"),
        ({"colour": "red"}, {"image": PNG}, "colour"),
        ({}, {"image": b""}, "image"),
        ({}, {"image": b"GIF89a"}, "image"),
        ({}, {"image": PNG[:-30]}, "image"),
        ({}, {"image": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, "image"),
    ],
)
def test_forms_that_cannot_be_used(gateway: Gateway, data: Any, files: Any, param: str | None) -> None:
    assert refused(gateway.client.post("/v1/captions", data=data, files=files))["param"] == param
    assert gateway.policy.requests == []


PART = b"--b\r\ncontent-disposition: form-data"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"no boundary"),
        ("multipart/form-data; boundary=b; charset=nonsense", PART + b"; name=n\r\n\r\n1\r\n--b--"),
        ("multipart/form-data; boundary=b", PART + b"\r\n\r\n1\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", PART + b"; name=image; filename=\xff\r\n\r\n"),
    ],
)
def test_broken_forms(gateway: Gateway, content_type: str, body: bytes) -> None:
    refused(gateway.client.post("/v1/captions", content=body, headers={"content-type": content_type}))


def test_an_upload_may_not_be_larger_than_an_image_may() -> None:
    gateway = Gateway(settings=ServingSection(limits=LimitsSection(max_image_mb=0.01)))
    padded = PNG + b"\0" * 20_000
    assert (
        "at most 10,485 are accepted"
        in refused(gateway.client.post("/v1/captions", files={"image": padded}))["message"]
    )
    refused(gateway.post("/v1/captions", {"image": data_uri(padded)}))


# -- bodies ------------------------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        DEEP,
        b'{"image":' + DEEP,
        b'{"a":NaN}',
        b"\xff\xfe",
        b'{"image": "\\ud800"}',
        b'{"captions": ["\\udfff"]}',
        b'{"n": ' + b"9" * 10_000 + b"}",
        b'{"temperature": Infinity, "image": ""}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/captions", "/v1/rewards", "/v1/score"])
def test_bodies_that_are_none(gateway: Gateway, path: str, body: bytes) -> None:
    response = gateway.client.post(path, content=body, headers={"content-type": "application/json"})
    assert isinstance(refused(response)["code"], str)
    assert len(response.content) < 500, "what was sent does not come back"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"inputs":[' + b'{"captions":["a"]},' * 1_000_000, "above_limit"),
        (b'{"captions":' + b"[[]" * 1_000_000, "above_limit"),
        (b'{"inputs":[' + b'{"a":[1]},' * 150_000, "above_limit"),
        (b'{"captions":[' + b"1," * 100_000 + b"1]}", "invalid_value"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}", "invalid_value"),
    ],
    ids=["inputs", "brackets", "objects", "captions", "keys"],
)
def test_millions_of_values_are_refused_before_they_are_built(gateway: Gateway, body: bytes, code: str) -> None:
    response = gateway.client.post("/v1/rewards", content=body, headers={"content-type": "application/json"})
    assert refused(response)["code"] == code
    assert len(response.content) < 500


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/captions", "/v1/rewards", "/v1/score"])
def test_a_page_of_a_stranger_cannot_send_what_browsers_send_unasked(
    gateway: Gateway, path: str, content_type: str
) -> None:
    body = json.dumps({"image": data_uri(PNG), "captions": ["a"]})
    response = gateway.client.post(path, content=body, headers={"content-type": content_type})
    assert refused(response, 415)["code"] == "unsupported_media_type"


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_of_one_picture_in_the_short_form(gateway: Gateway) -> None:
    gateway.reward.sigma = 0.25
    body = {"image": data_uri(PNG), "captions": ["ab", "abcd"], "references": ["r"], "prompt": "p"}
    assert gateway.post("/v1/rewards", body).json() == {
        "object": "list",
        "reward": "length",
        "version": "v1",
        "data": [
            {
                "index": 0,
                "image_hash": SHA,
                "rewards": [
                    {
                        "index": index,
                        "total": characters - 1.0,
                        "parts": {"characters": characters, "references": 1.0},
                        "weights": {"characters": 1.0, "references": -1.0},
                        "sigma": 0.25,
                        "missing": {},
                        "error": None,
                    }
                    for index, characters in enumerate((2.0, 4.0))
                ],
            }
        ],
    }
    ((item,),) = gateway.reward.items
    assert (item.images, item.captions, item.references, item.prompt) == ((PNG,), ("ab", "abcd"), ("r",), "p")
    assert "image_hash" not in item.prompt


def test_a_batch_and_a_picture_by_its_hash(gateway: Gateway) -> None:
    first = {"image": data_uri(PNG), "captions": ["a"]}
    named = gateway.post("/v1/rewards", {"inputs": [first, {"captions": ["abc", "b"]}]}).json()["data"]
    assert [item["image_hash"] for item in named] == [SHA, None]
    assert [[reward["total"] for reward in item["rewards"]] for item in named] == [[1.0], [3.0, 1.0]]
    assert named[0]["rewards"][0]["sigma"] is None
    again = gateway.post("/v1/rewards", {"image_hash": SHA, "captions": ["ab"]})
    assert again.json()["data"][0]["image_hash"] == SHA
    assert gateway.reward.items[-1][0].images == ()
    unknown = gateway.post("/v1/rewards", {"image_hash": "0" * 64, "captions": ["ab"]})
    assert refused(unknown, 404)["code"] == "image_not_found"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"inputs": []}, "inputs"),
        ({"inputs": [{"captions": ["a"]}], "captions": ["a"]}, None),
        ({"inputs": [{"captions": ["a"]}], "prompt": "p"}, None),
        ({"captions": []}, "captions"),
        ({"captions": "a"}, "captions"),
        ({"captions": ["a", 1]}, "captions[1]"),
        ({"captions": ["a"] * 7}, "captions"),
        ({"inputs": [{"captions": ["a"] * 4}] * 2}, "captions"),
        ({"captions": ["x" * 51]}, "captions"),
        ({"captions": ["a"], "references": ["a"] * 4}, "references"),
        ({"captions": ["a"], "references": ["x" * 51]}, "references"),
        ({"captions": ["a"], "prompt": "x" * 51}, "prompt"),
        ({"captions": ["a"], "image": "data:,"}, "image"),
        ({"captions": ["a"], "image_hash": "../../etc"}, "image_hash"),
        ({"captions": ["a"], "image_hash": SHA, "image": data_uri(PNG)}, "image_hash"),
        ({"inputs": [{"captions": ["a"], "image_hash": SHA, "image": data_uri(PNG)}]}, "inputs[0].image_hash"),
        ({"inputs": [{"captions": ["a"]}, {"captions": ["a"], "image": "data:,"}]}, "inputs[1].image"),
        ({"inputs": [{"captions": ["a"], "picture": ""}]}, "inputs[0].picture"),
    ],
)
def test_rewards_that_cannot_be_given(gateway: Gateway, body: dict[str, Any], param: str | None) -> None:
    assert refused(gateway.post("/v1/rewards", body))["param"] == param
    assert gateway.reward.items == []


def test_a_reward_that_fails_is_an_error_and_no_zero(gateway: Gateway) -> None:
    gateway.reward.error = RewardError("reward gave NaN for input 0")
    for path, body in (("/v1/rewards", {"captions": ["a"]}), ("/v1/score", {"queries": "r", "documents": "a"})):
        error = refused(gateway.post(path, body), 502)
        assert (error["code"], error["message"]) == ("reward_failed", "reward gave NaN for input 0")


def test_a_caption_without_a_reward_has_an_error_of_its_own(gateway: Gateway) -> None:
    gateway.reward.failing = ("bad",)
    response = gateway.post("/v1/rewards", {"captions": ["ab", "bad"]})
    assert response.status_code == 200
    good, bad = response.json()["data"][0]["rewards"]
    assert (good["total"], good["error"]) == (2.0, None)
    assert bad["error"] == {"code": "reward_failed", "message": "no number for bad"}
    assert (bad["total"], bad["parts"], bad["sigma"]) == (None, {}, None)
    (alone,) = gateway.post("/v1/rewards", {"captions": ["bad"]}).json()["data"][0]["rewards"]
    assert alone["total"] is None
    error = refused(gateway.post("/v1/score", {"queries": "r", "documents": ["a", "bad"]}), 502)
    assert error["message"].startswith("document 1 has no reward: no number for bad")


def test_a_nan_that_nobody_caught_is_no_number_either(gateway: Gateway) -> None:
    gateway.reward.sigma = float("nan")
    for path, body in (("/v1/rewards", {"captions": ["a"]}), ("/v1/score", {"queries": "r", "documents": "a"})):
        assert "no finite number" in refused(gateway.post(path, body), 502)["message"]


def test_a_wrong_count_is_an_error(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FakeReward.score

    async def one_short(self: FakeReward, items: Any) -> Any:
        return await whole(self, tuple(replace(item, captions=item.captions[1:]) for item in items))

    monkeypatch.setattr(FakeReward, "score", one_short)
    for path, body in (("/v1/rewards", {"captions": ["a", "b"]}), ("/v1/score", {"queries": "r", "documents": "a"})):
        assert refused(gateway.post(path, body), 502)["code"] == "reward_failed"


def test_no_reward_is_served() -> None:
    gateway = Gateway(reward=None)
    assert refused(gateway.post("/v1/rewards", {"captions": ["a"]}), 404)["code"] == "reward_not_served"
    assert refused(gateway.post("/v1/score", {"queries": "a", "documents": "b"}), 404)["code"] == "reward_not_served"
    assert gateway.client.get("/health/ready").status_code == 200


# -- score -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), [("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2")])
def test_one_query_for_several_documents(gateway: Gateway, left: str, right: str) -> None:
    query = {"content": [text_part("r1"), image_part(PNG), text_part("r2")]}
    documents = ["abcd", {"content": [text_part("ab"), text_part("cde")]}]
    answer = gateway.post("/v1/score", {"model": "reward", left: query, right: documents}).json()
    assert [(item["index"], item["object"], item["score"]) for item in answer["data"]] == [
        (0, "score", 2.0),
        (1, "score", 3.0),
    ]
    assert (answer["object"], answer["model"]) == ("list", "length")
    ((item,),) = gateway.reward.items
    assert (item.images, item.captions, item.references) == ((PNG,), ("abcd", "abcde"), ("r1", "r2"))


def test_as_many_queries_as_documents(gateway: Gateway) -> None:
    queries = [{"content": [image_part(PNG)]}, {"content": [image_part(OTHER), text_part("r")]}, "just a reference"]
    answer = gateway.post("/v1/score", {"queries": queries, "documents": ["a", "ab", "abc"]}).json()
    assert [item["score"] for item in answer["data"]] == [1.0, 1.0, 2.0]
    (items,) = gateway.reward.items
    assert [(item.images, item.captions, item.references) for item in items] == [
        ((PNG,), ("a",), ()),
        ((OTHER,), ("ab",), ("r",)),
        ((), ("abc",), ("just a reference",)),
    ]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"queries": "a"},
        {"queries": "a", "text_2": "b"},
        {"queries": "a", "documents": "b", "text_1": "c", "text_2": "d"},
        {"queries": "a", "documents": []},
        {"queries": [], "documents": ["a"]},
        {"queries": ["a", "b"], "documents": ["a", "b", "c"]},
        {"queries": "a", "documents": ["b"] * 7},
        {"queries": {"content": []}, "documents": "b"},
        {"queries": {"content": [image_part(PNG)] * 3}, "documents": "b"},
        {"queries": {"content": [text_part("r")] * 4}, "documents": "b"},
        {"queries": "a", "documents": {"content": [image_part(PNG)]}},
        {"queries": "a", "documents": [[["b"]]]},
        {"queries": 3, "documents": "b"},
    ],
)
def test_scores_that_cannot_be_given(gateway: Gateway, body: dict[str, Any]) -> None:
    refused(gateway.post("/v1/score", body))
    assert gateway.reward.items == []


def test_another_model_is_not_answered_for(gateway: Gateway) -> None:
    body = {"model": "bge-reranker", "queries": "a", "documents": "b"}
    assert refused(gateway.post("/v1/score", body), 404)["code"] == "model_not_found"
    assert gateway.post("/v1/score", {**body, "model": "length"}).status_code == 200
