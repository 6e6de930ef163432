"""`Client`: what it sends, how long it goes on trying, and what it raises. The gateway is a script of answers."""

from __future__ import annotations

import email.utils
import hashlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import mmrl_ray
from mmrl_ray.client import Caption, Captions, Client, Model, Reward, Rewards
from mmrl_ray.config.serving import ServingSection
from mmrl_ray.errors import (
    AccessError,
    ConfigError,
    DataError,
    ImageError,
    MMRLError,
    OverloadedError,
    RewardError,
    ServingError,
    UnknownImageError,
    UnknownModelError,
)
from mmrl_ray.serving.app import GatewayDeps, make_app
from mmrl_ray.serving.keys import KeyStore
from tests.support.fake_services import FakePolicy, FakeReward, running_gateway
from tests.unit.data.pictures import picture

Step = httpx.Response | Exception
MODELS = {"data": [{"id": "m", "object": "model", "created": 7, "root": "m", "parent": None, "step": 0, "new": 1}]}


class Gateway:
    """Answers in order, the last answer for ever."""

    def __init__(self, *steps: Step) -> None:
        self._steps = list(steps)
        self.asked: list[httpx.Request] = []
        self.slept: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
        if isinstance(step, Exception):
            raise step
        return step

    def client(self, **options: Any) -> Client:
        options = {"key": "mmrl-k", "transport": httpx.MockTransport(self), "sleep": self.slept.append, **options}
        return Client("http://gate:8000", **options)


def ok(value: Any) -> httpx.Response:
    return httpx.Response(200, json=value)


def refused(status: int, code: str = "x", message: str = "no", **headers: str) -> httpx.Response:
    error = {"message": message, "type": "t", "param": None, "code": code}
    return httpx.Response(status, json={"error": error}, headers={k.replace("_", "-"): v for k, v in headers.items()})


# -- calls -------------------------------------------------------------------------------------------------------------


def test_models_and_version() -> None:
    gateway = Gateway(ok(MODELS), ok({"version": "0.1.0", "more": 1}))
    with gateway.client() as client:
        assert client.models() == (Model("m", 7, "m", None, 0),)
        assert client.version() == "0.1.0"
    assert [str(r.url) for r in gateway.asked] == ["http://gate:8000/v1/models", "http://gate:8000/version"]
    assert {r.headers["authorization"] for r in gateway.asked} == {"Bearer mmrl-k"}


@pytest.mark.parametrize("as_path", [False, True])
def test_caption_uploads_the_picture(as_path: bool, tmp_path: Path) -> None:
    data = picture(9, "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    said = [{"index": i, "text": t, "finish_reason": f} for i, (t, f) in enumerate([("a", "stop"), ("b", "length")])]
    gateway = Gateway(ok({"model": "m", "version": 4, "image_hash": "ab", "captions": said, "usage": {}}))
    made = gateway.client().caption(
        tmp_path / "a.jpg" if as_path else data, n=2, temperature=0.0, max_tokens=5, seed=0, prompt="what?"
    )
    assert made == Captions((Caption("a", "stop"), Caption("b", "length")), "m", 4, "ab")
    (request,) = gateway.asked
    assert request.headers["content-type"].startswith("multipart/form-data")
    body = request.content
    assert data in body
    for name, value in {"n": "2", "temperature": "0.0", "max_tokens": "5", "seed": "0", "prompt": "what?"}.items():
        assert f'name="{name}"\r\n\r\n{value}\r\n'.encode() in body
    assert b'name="model"' not in body


def test_rewards() -> None:
    rewards = [
        {"index": i, "total": t, "parts": {"bleu": t}, "weights": {"bleu": 1.0}, "sigma": s}
        for i, t, s in [(1, 0.25, 0.1), (0, 0.5, None)]
    ]
    failed = {"total": None, "parts": {}, "weights": {}, "sigma": None, "error": {"message": "it hung"}}
    gateway = Gateway(ok({"version": "v1", "data": [{"image_hash": None, "rewards": [{"index": 0, **failed}]}]}))
    assert gateway.client().rewards(None, ["x"]).rewards == (Reward(None, {}, {}, None, "it hung"),)
    gateway = Gateway(ok({"version": "v1", "data": [{"index": 0, "image_hash": "ab", "rewards": rewards}]}))
    scored = gateway.client().rewards(picture(1, "WEBP"), ("x", "y"), references=("z",), prompt="p")
    assert scored == Rewards(
        (Reward(0.5, {"bleu": 0.5}, {"bleu": 1.0}, None), Reward(0.25, {"bleu": 0.25}, {"bleu": 1.0}, 0.1)), "v1", "ab"
    )
    gateway.client().rewards(None, ["x"], image_hash="ab")
    first, second = (json.loads(request.content)["inputs"] for request in gateway.asked)
    assert first[0].pop("image").startswith("data:image/webp;base64,")
    assert first == [{"captions": ["x", "y"], "references": ["z"], "prompt": "p"}]
    assert second == [{"captions": ["x"], "references": [], "image_hash": "ab"}]


def test_score_comes_in_the_order_of_the_captions() -> None:
    gateway = Gateway(ok({"data": [{"index": 1, "score": 0.25}, {"index": 0, "score": 1}]}))
    assert gateway.client().score(picture(), ["x", "y"], references=["r"]) == (1.0, 0.25)
    body = json.loads(gateway.asked[0].content)
    assert [part["type"] for part in body["queries"]["content"]] == ["image_url", "text"]
    assert [each["content"][0]["text"] for each in body["documents"]] == ["x", "y"]


def test_pictures_that_cannot_be_sent() -> None:
    gateway = Gateway(ok({}))
    with pytest.raises(DataError, match=r"image no/such\.png cannot be read"):
        gateway.client().caption("no/such.png")
    with pytest.raises(ImageError, match="text instead of an image"):
        gateway.client().rewards(b"hello", ["x"])
    assert gateway.asked == []


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (ok({}), True),
        (refused(503, "not_ready"), False),
        (httpx.ConnectError("x"), False),
        (httpx.ReadTimeout("x"), False),
    ],
)
def test_ready_asks_once(step: Step, expected: bool) -> None:
    gateway = Gateway(step)
    assert gateway.client().ready() is expected
    assert (len(gateway.asked), gateway.slept) == (1, [])


def test_ready_without_a_key_is_an_error() -> None:
    with pytest.raises(AccessError):
        Gateway(refused(401)).client().ready()


# -- against a gateway -------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[str, str, FakePolicy]]:
    """URL, key and policy of a real one."""
    store = KeyStore(f"sqlite:///{tmp_path}/keys.db")
    key, _ = store.create("test", ["infer"])
    policy = FakePolicy()
    app = make_app(GatewayDeps(policy, FakeReward(), store, ServingSection()))
    with running_gateway(app) as url:
        yield url, key, policy
    store.close()


def test_it_and_the_gateway_understand_each_other(place: tuple[str, str, FakePolicy]) -> None:
    url, key, policy = place
    data = picture(5)
    with Client(url, key) as client:
        assert client.ready()
        assert client.version() == mmrl_ray.__version__
        assert [(m.id, m.parent, m.step) for m in client.models()] == [("tiny", None, 0), ("run-a", "tiny", 40)]
        made = client.caption(data, model="run-a", prompt="what?", n=2, temperature=0.5, max_tokens=3, seed=7)
        assert (made.model, made.version, made.image_hash) == ("run-a", 40, hashlib.sha256(data).hexdigest())
        assert made.captions == (Caption("a red square", "length"), Caption("a red square", "length"))
        asked = policy.requests[-1]
        assert (asked.images, asked.turns[0].parts, asked.n) == ((data,), (0, "what?"), 2)
        assert (asked.sampling.temperature, asked.sampling.max_new_tokens, asked.sampling.seed) == (0.5, 3, 7)
        scored = client.rewards(data, ["abc", "abcde"], references=["x"])
        assert [reward.total for reward in scored.rewards] == [2.0, 4.0]
        assert scored.rewards[0].weights == {"characters": 1.0, "references": -1.0}
        assert (scored.version, scored.image_hash) == ("v1", made.image_hash)
        again = client.rewards(None, ["abc"], image_hash=scored.image_hash)
        assert [reward.total for reward in again.rewards] == [3.0]
        assert client.score(data, ["abc", "abcde"], references=["x"]) == (2.0, 4.0)


def test_it_and_the_gateway_understand_each_others_errors(place: tuple[str, str, FakePolicy]) -> None:
    url, key, policy = place
    with Client(url, key, retries=0) as client:
        with pytest.raises(UnknownModelError, match="'nobody'"):
            client.caption(picture(), model="nobody")
        with pytest.raises(UnknownImageError):
            client.rewards(None, ["a"], image_hash="0" * 64)
        with pytest.raises(ImageError, match="broken PNG"):
            client.caption(picture()[:50])
        with pytest.raises(DataError, match="n: 1,000 is above 16"):
            client.caption(picture(), n=1000)
        policy.error = OverloadedError("full")
        with pytest.raises(OverloadedError, match="full"):
            client.caption(picture())
        policy.error = ZeroDivisionError("secret")
        with pytest.raises(ServingError, match="the server failed"):
            client.caption(picture())
        policy.is_ready = False
        assert not client.ready()
    with Client(url, "mmrl-wrong") as client, pytest.raises(AccessError):
        client.models()


# -- retries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        refused(429),
        refused(503),
        httpx.ConnectError("x"),
        httpx.ConnectTimeout("x"),
        httpx.ReadError("x"),
        httpx.RemoteProtocolError("server disconnected"),
    ],
    ids=repr,
)
def test_what_passes_is_tried_again(step: Step) -> None:
    gateway = Gateway(step, step, ok(MODELS))
    assert gateway.client().models()[0].id == "m"
    assert len(gateway.asked) == 3
    first, second = gateway.slept
    assert 0.125 <= first <= 0.25
    assert 0.25 <= second <= 0.5


@pytest.mark.parametrize(
    "step",
    [refused(400), refused(401), refused(404), refused(500), refused(502), refused(504), httpx.ReadTimeout("x")],
    ids=repr,
)
def test_what_does_not_pass_is_not(step: Step) -> None:
    gateway = Gateway(step, ok(MODELS))
    with pytest.raises(MMRLError):
        gateway.client().models()
    assert (len(gateway.asked), gateway.slept) == (1, [])


def test_retry_after_is_honoured() -> None:
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    steps = [refused(429, retry_after=text) for text in ("3", date, "0", "soon", "-5")]
    gateway = Gateway(*steps, ok(MODELS))
    gateway.client().models()
    seconds, until, now, nonsense, negative = gateway.slept
    assert 3 <= seconds <= 3.75
    assert 15 <= until <= 25
    assert now == 0
    assert 1 <= nonsense <= 2  # as if it were not there: the fourth wait
    assert 2 <= negative <= 4


def test_a_wait_that_is_too_long_ends_it() -> None:
    gateway = Gateway(refused(429, message="slow down", retry_after="3600"))
    with pytest.raises(OverloadedError, match="slow down"):
        gateway.client().models()
    assert (len(gateway.asked), gateway.slept) == (1, [])


@pytest.mark.parametrize(
    ("step", "kind"), [(refused(503, message="full"), OverloadedError), (httpx.ConnectError("x"), ServingError)]
)
def test_tries_are_counted(step: Step, kind: type[MMRLError]) -> None:
    gateway = Gateway(step)
    with pytest.raises(kind) as raised:
        gateway.client(retries=9).models()
    assert type(raised.value) is kind
    assert len(gateway.asked) == 10
    assert len(gateway.slept) == 9
    assert max(gateway.slept) <= 30
    with pytest.raises(kind):
        gateway.client(retries=0).models()
    assert len(gateway.asked) == 11


def test_a_picture_is_sent_whole_each_time() -> None:
    gateway = Gateway(refused(503), ok({"model": "m", "version": 0, "image_hash": "a", "captions": []}))
    gateway.client().caption(picture(3))
    assert all(picture(3) in request.content for request in gateway.asked)
    assert len(gateway.asked) == 2


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_value", DataError),
        (400, "invalid_image", ImageError),
        (401, "invalid_api_key", AccessError),
        (403, "forbidden", AccessError),
        (404, "model_not_found", UnknownModelError),
        (404, "image_not_found", UnknownImageError),
        (404, "not_found", ServingError),
        (413, "too_large", DataError),
        (502, "reward_failed", RewardError),
        (500, "internal_error", ServingError),
        (504, "timeout", ServingError),
    ],
)
def test_errors_by_kind(status: int, code: str, kind: type[MMRLError]) -> None:
    with pytest.raises(kind, match=r"^first second$") as raised:
        Gateway(refused(status, code, "first\n second")).client().models()
    assert type(raised.value) is kind


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(404, text="nothing"),
        httpx.Response(302, headers={"location": "http://elsewhere/"}),
        httpx.Response(500, json=[1]),
        httpx.Response(500, json={"error": "text"}),
        ok({"data": [{"id": 1}]}),
        ok([1, 2]),
        ok("x"),
    ],
    ids=repr,
)
def test_something_else_than_a_gateway(response: httpx.Response) -> None:
    with pytest.raises(ServingError, match="http://gate:8000 answered") as raised:
        Gateway(response).client().models()
    assert "\n" not in str(raised.value)


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Client(url, retries=1, sleep=lambda _: None) as client:
            with pytest.raises(ServingError, match=f"{url}: .*is a gateway running there"):
                client.models()
            assert not client.ready()


# -- URL and key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["http://gate:8000", "http://gate:8000/", "http://gate:8000/v1", "http://gate:8000/v1/"]
)
def test_the_url_may_be_the_one_of_openais_client(url: str) -> None:
    gateway = Gateway(ok(MODELS))
    Client(url, transport=httpx.MockTransport(gateway)).models()
    assert str(gateway.asked[0].url) == "http://gate:8000/v1/models"


def test_a_gateway_may_lie_below_a_path() -> None:
    gateway = Gateway(ok(MODELS))
    Client("https://host/serving/v1", transport=httpx.MockTransport(gateway)).models()
    assert str(gateway.asked[0].url) == "https://host/serving/v1/models"


@pytest.mark.parametrize("url", ["", "gate", "gate:8000", "ftp://gate", "http://", "http://[::", "file:///x"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="gateway"):
        Client(url)


@pytest.mark.parametrize(
    ("environment", "key", "header"),
    [
        (None, None, None),
        ("mmrl-e", None, "Bearer mmrl-e"),
        ("mmrl-e\n", None, "Bearer mmrl-e"),
        ("mmrl-e", "mmrl-k", "Bearer mmrl-k"),
        ("mmrl-e", "", None),
    ],
)
def test_where_the_key_comes_from(
    monkeypatch: pytest.MonkeyPatch, environment: str | None, key: str | None, header: str | None
) -> None:
    monkeypatch.delenv("MMRL_API_KEY", raising=False)
    if environment is not None:
        monkeypatch.setenv("MMRL_API_KEY", environment)
    gateway = Gateway(ok(MODELS))
    gateway.client(key=key).models()
    assert gateway.asked[0].headers.get("authorization") == header


@pytest.mark.parametrize("key", ["a b", "a\r\nHost: x", "ключ"])
def test_a_broken_key_is_not_quoted(key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Client("http://gate", key)
    assert key not in str(raised.value)


def test_the_key_is_not_shown() -> None:
    assert repr(Client("http://gate:8000", "mmrl-secret")) == "Client('http://gate:8000')"


def test_importing_the_package_stays_light() -> None:
    code = (
        "import sys, mmrl_ray; assert 'httpx' not in sys.modules; mmrl_ray.Client('http://x'); "
        "print([m for m in ('ray', 'torch', 'transformers', 'pydantic', 'PIL', 'fastapi') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
    assert mmrl_ray.Client is Client
    missing: Callable[[], Any] = lambda: mmrl_ray.Nothing  # noqa: E731
    with pytest.raises(AttributeError, match="Nothing"):
        missing()
