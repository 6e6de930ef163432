"""Who gets in: keys, roles, rates, sizes; and that every failure is an error object that tells nothing internal."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.routing import Route

from mmrl_ray.config.serving import LimitsSection, RateSection, ServingSection
from mmrl_ray.errors import (
    AdapterError,
    ConfigError,
    ContextLengthError,
    DataError,
    ImageError,
    MMRLError,
    ModelError,
    OverloadedError,
    RewardError,
    ServingError,
    UnknownModelError,
)
from mmrl_ray.serving.app import GatewayDeps, make_app
from mmrl_ray.serving.auth import is_loopback
from mmrl_ray.serving.keys import KeyStore
from tests.support.fake_services import ADAPTER, FakePolicy, FakeReward, png, wait_until
from tests.support.meters import MemoryMeter

DATA_URI = "data:image/png;base64," + base64.b64encode(png()).decode()
CAPTION = {"image": DATA_URI}


class Gateway:
    """An app over fakes, and a client of it for each role."""

    def __init__(self, store: KeyStore, settings: ServingSection) -> None:
        self.policy, self.reward, self.store = FakePolicy(), FakeReward(), store
        self.meter = MemoryMeter()
        self.app = make_app(GatewayDeps(self.policy, self.reward, store, settings, meter=self.meter))
        self.stranger = TestClient(self.app, raise_server_exceptions=False)
        self.infer, self.feedback, self.admin = (self.client(role) for role in ("infer", "feedback", "admin"))

    def client(self, role: Any) -> TestClient:
        key, _ = self.store.create(role, [role])
        return TestClient(self.app, raise_server_exceptions=False, headers={"authorization": f"Bearer {key}"})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    store = KeyStore(f"sqlite:///{tmp_path}/keys.db")
    yield store
    store.close()


@pytest.fixture
def gateway(store: KeyStore) -> Gateway:
    return Gateway(store, ServingSection())


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error object, after its shape was checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", response.headers["x-request-id"])
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert "\n" not in error["message"]
    assert isinstance(error["code"], str)
    return error


def test_every_route_but_liveness_needs_a_key(gateway: Gateway) -> None:
    walked = [route for route in gateway.app.routes if isinstance(route, Route) or hasattr(route, "methods")]
    assert len(walked) == len(gateway.app.routes), "a mount or a web socket: this test must learn of it"
    paths = {route.path for route in walked}
    assert paths >= {"/v1/chat/completions", "/health/live", "/health/ready", "/docs", "/openapi.json", "/metrics"}
    for route in walked:
        path = route.path.replace("{model}", ADAPTER).replace("{id}", "a-run")
        for method in route.methods or ():
            for headers in ({}, {"authorization": "Bearer mmrl-" + "A" * 43}, {"authorization": "Bearer"}):
                response = gateway.stranger.request(method, path, headers=headers)
                if path == "/health/live":
                    assert response.status_code == 200
                    continue
                error = error_of(response, 401)
                assert error["code"] == "invalid_api_key"
                assert error["type"] == "authentication_error"
                scheme = "Basic" if path.startswith(("/docs", "/openapi.json")) else "Bearer"
                assert response.headers["www-authenticate"].startswith(scheme)
    assert gateway.policy.requests == []


def test_a_stranger_learns_of_no_path_and_method(gateway: Gateway) -> None:
    for method, path in (("GET", "/nothing"), ("DELETE", "/v1/models"), ("POST", "/health/live/"), ("GET", "//v1")):
        error_of(gateway.stranger.request(method, path), 401)
    assert error_of(gateway.infer.get("/nothing"), 404)["code"] == "not_found"
    assert error_of(gateway.infer.delete("/v1/models"), 405)["code"] == "method_not_allowed"


def test_roles(gateway: Gateway) -> None:
    work = [("POST", path) for path in ("/v1/chat/completions", "/v1/captions", "/v1/rewards", "/v1/score")]
    for method, path in [*work, ("GET", "/v1/models"), ("GET", f"/v1/models/{ADAPTER}")]:
        error = error_of(gateway.feedback.request(method, path, json={}), 403)
        assert error["code"] == "forbidden"
        assert "role feedback" in error["message"]
        assert gateway.infer.request(method, path, json={}).status_code in (200, 400)
        assert gateway.admin.request(method, path, json={}).status_code in (200, 400)
    for path in ("/health/ready", "/metrics", "/version", "/docs", "/openapi.json"):
        assert gateway.feedback.get(path).status_code == 200


def test_a_revoked_key_is_refused(gateway: Gateway) -> None:
    assert gateway.infer.get("/version").status_code == 200
    gateway.store.revoke(next(record.id for record in gateway.store.list() if record.name == "infer"))
    error_of(gateway.infer.get("/version"), 401)


def test_a_browser_shows_the_documentation_for_a_key_as_password(gateway: Gateway) -> None:
    key, _ = gateway.store.create("browser", ["feedback"])
    basic = {"authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}
    assert "swagger" in gateway.stranger.get("/docs", headers=basic).text
    assert gateway.stranger.get("/openapi.json", headers=basic).json()["openapi"].startswith("3.")
    for path in ("/version", "/v1/models"):  # a stranger's page cannot use what the browser remembers
        error_of(gateway.stranger.get(path, headers=basic), 401)
    for broken in ("Basic", "Basic !!!", "Basic " + base64.b64encode(b"nothing").decode()):
        error_of(gateway.stranger.get("/docs", headers={"authorization": broken}), 401)


def test_the_documentation_loads_nothing_from_elsewhere(gateway: Gateway) -> None:
    page = gateway.infer.get("/docs").text
    loaded = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert "docs/swagger-ui-bundle.js" in loaded
    for url in loaded:
        assert "//" not in url
        if not url.startswith("data:"):
            answer = gateway.infer.get(f"/{url}")
            assert (answer.status_code, len(answer.content) > 100_000) == (200, True)
            error_of(gateway.stranger.get(f"/{url}"), 401)
    assert "http" not in page


def test_liveness_may_be_asked_for_without_a_body(gateway: Gateway) -> None:
    assert (gateway.stranger.head("/health/live").status_code, gateway.stranger.head("/health/live").content) == (
        200,
        b"",
    )


def test_web_pages_of_listed_origins_may_ask(store: KeyStore) -> None:
    ours, asks = {"origin": "https://app.example.com"}, {"access-control-request-method": "POST"}
    gateway = Gateway(store, ServingSection(cors_origins=["https://app.example.com"]))
    leave = gateway.stranger.options("/v1/captions", headers={**ours, **asks})
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == ours["origin"]
    answers = [client.get("/v1/models", headers=ours) for client in (gateway.infer, gateway.stranger)]
    assert [answer.status_code for answer in answers] == [200, 401]
    assert all(answer.headers["access-control-allow-origin"] == ours["origin"] for answer in answers)
    theirs = gateway.infer.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in theirs.headers
    # In JSON, which the front end in front of the gateway lets through as it is.
    refused = gateway.stranger.options("/v1/captions", headers={"origin": "https://evil.example", **asks})
    assert (refused.status_code, refused.headers["content-type"]) == (400, "application/json")
    assert refused.json()["error"]["code"] == "cross_origin_refused"
    assert "access-control-allow-origin" not in refused.headers
    off = Gateway(store, ServingSection())
    error_of(off.stranger.options("/v1/captions", headers={**ours, **asks}), 401)
    for origin in ("*", "https://app.example.com/", "app.example.com", "null"):
        with pytest.raises(ValueError, match="cors_origins"):
            ServingSection(cors_origins=[origin])


def test_wrong_keys_are_throttled_and_those_that_work_are_not(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gateway.infer.get("/version").status_code == 200
    wrong = [{"authorization": f"Bearer mmrl-{i:043d}"} for i in range(140)]
    statuses = [gateway.stranger.get("/version", headers=headers).status_code for headers in wrong]
    assert statuses[:100] == [401] * 100
    assert 429 in statuses[100:]
    monkeypatch.setattr(gateway.store, "cached", lambda key: None)  # long ago
    assert gateway.infer.get("/version").status_code == 200, "a key that has worked is looked up all the same"
    looked = []
    verify = gateway.store.verify
    monkeypatch.setattr(gateway.store, "verify", lambda key: looked.append(key) or verify(key))
    refused = [gateway.stranger.get("/version", headers=headers) for headers in wrong[:40]]
    throttled = [answer for answer in refused if answer.status_code == 429]
    assert throttled
    assert len(looked) == len(refused) - len(throttled), "what is throttled costs no look-up"
    assert int(throttled[0].headers["retry-after"]) >= 1


def test_keys_are_looked_up_in_threads_of_their_own(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    verify = gateway.store.verify
    monkeypatch.setattr(
        gateway.store, "verify", lambda key: names.append(threading.current_thread().name) or verify(key)
    )
    assert gateway.infer.get("/version").status_code == 200
    assert names[0].startswith("keys")


def test_a_key_database_that_is_away_is_503_and_tells_no_password(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(key: str) -> None:
        raise ServingError("key database postgresql://secret")

    monkeypatch.setattr(gateway.store, "verify", fail)
    response = gateway.infer.get("/version")
    assert error_of(response, 503)["code"] == "keys_unavailable"
    assert "secret" not in response.text
    assert response.headers["retry-after"] == "1"


def test_rate_and_concurrency_are_429_with_retry_after(store: KeyStore) -> None:
    rate = RateSection(requests_per_minute=2.0, burst=2, concurrency=1)
    gateway = Gateway(store, ServingSection(rate=rate))
    assert [gateway.infer.get("/version").status_code for _ in range(2)] == [200, 200]
    response = gateway.infer.get("/version")
    assert error_of(response, 429)["code"] == "rate_limit_exceeded"
    assert 25 <= int(response.headers["retry-after"]) <= 30
    assert gateway.admin.get("/version").status_code == 200, "another key has its own"
    assert gateway.stranger.get("/health/live").status_code == 200


def test_a_failed_request_gives_its_place_back(store: KeyStore) -> None:
    gateway = Gateway(store, ServingSection(rate=RateSection(concurrency=1)))
    gateway.policy.error = RuntimeError("x")
    assert [gateway.infer.post("/v1/captions", json=CAPTION).status_code for _ in range(3)] == [500] * 3
    assert [gateway.infer.get("/nothing").status_code for _ in range(3)] == [404] * 3


def test_a_body_that_is_too_large_is_refused_while_it_arrives(store: KeyStore) -> None:
    gateway = Gateway(store, ServingSection(limits=LimitsSection(max_body_mb=0.01)))
    json = {"content-type": "application/json"}
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b"x" * 1000

    for path in ("/v1/chat/completions", "/v1/captions", "/v1/rewards", "/v1/score"):
        announced = gateway.infer.post(path, content=b"x" * 20_000, headers=json)
        assert error_of(announced, 413)["code"] == "body_too_large"
        error_of(gateway.infer.post(path, content=endless(), headers=json), 413)
    error_of(gateway.infer.post("/v1/captions", files={"image": b"x" * 20_000}), 413)
    boundary = {"content-type": "multipart/form-data; boundary=b"}
    error_of(gateway.infer.post("/v1/captions", content=endless(), headers=boundary), 413)
    assert gateway.infer.post("/v1/captions", json=CAPTION).status_code == 200


def test_a_client_may_name_its_request(gateway: Gateway) -> None:
    assert gateway.infer.get("/version", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 65, "a\tb", ""):
        assert gateway.infer.get("/version", headers={"x-request-id": bad}).headers["x-request-id"] != bad
    ids = {gateway.infer.get("/version").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ImageError("no picture"), 400, "invalid_image"),
        (DataError("no text"), 400, "invalid_value"),
        (ConfigError("no value"), 400, "invalid_value"),
        (ContextLengthError("too long"), 400, "context_length_exceeded"),
        (AdapterError("pickled"), 400, "adapter_refused"),
        (UnknownModelError("nobody"), 404, "model_not_found"),
        (OverloadedError("full"), 503, "overloaded"),
        (RewardError("NaN"), 502, "reward_failed"),
    ],
)
def test_errors_that_say_something_about_the_request(
    gateway: Gateway, error: MMRLError, status: int, code: str
) -> None:
    gateway.policy.error = error
    for body in (CAPTION, {**CAPTION, "n": 2}):
        response = gateway.infer.post("/v1/captions", json=body)
        found = error_of(response, status)
        assert (found["code"], found["message"]) == (code, str(error))
        assert ("retry-after" in response.headers) == (status == 503)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}
    assert error_of(gateway.infer.post("/v1/chat/completions", json=chat), status)["code"] == code


@pytest.mark.parametrize("error", [RuntimeError("secret\npath"), ServingError("secret"), ModelError("secret /home")])
def test_other_errors_are_500_and_tell_nothing(
    gateway: Gateway, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.policy.error = error
    response = gateway.infer.post("/v1/captions", json=CAPTION, headers={"x-request-id": "find-me"})
    found = error_of(response, 500)
    assert found["code"] == "internal_error"
    assert "secret" not in response.text
    assert "find-me" in caplog.text
    assert "secret" in caplog.text, "the log has what the client has not"


def test_an_answer_that_takes_too_long_is_504_and_its_work_ends(store: KeyStore) -> None:
    gateway = Gateway(store, ServingSection(request_timeout_s=0.05))
    gateway.policy.block = gateway.reward.block = True
    reward = {"captions": ["a"], "image": DATA_URI}
    for path, body in (("/v1/captions", CAPTION), ("/v1/rewards", reward)):
        assert error_of(gateway.infer.post(path, json=body), 504)["code"] == "timeout"
    wait_until(lambda: gateway.policy.running == gateway.reward.running == 0)


def test_insecure_is_for_loopback_only(store: KeyStore) -> None:
    with pytest.raises(ConfigError, match="insecure"):
        make_app(GatewayDeps(FakePolicy(), None, None, ServingSection(host="0.0.0.0"), insecure=True))
    with pytest.raises(ConfigError, match="key store"):
        make_app(GatewayDeps(FakePolicy(), None, None, ServingSection()))
    app = make_app(GatewayDeps(FakePolicy(), None, store, ServingSection(), insecure=True))
    for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"):
        assert TestClient(app, headers={"host": host}).get("/version").status_code == 200
    for host in ("attacker.example", "127.0.0.1.attacker.example", "10.0.0.1", "", "["):
        response = TestClient(app, headers={"host": host}).get("/version")
        assert error_of(response, 403)["code"] == "forbidden", "a name that was made to point here"


def test_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "", "example.com", "10.0.0.1")] == [False] * 5


def test_readiness(gateway: Gateway) -> None:
    assert gateway.infer.get("/health/ready").json() == {"status": "ready"}
    gateway.policy.is_ready = False
    response = gateway.infer.get("/health/ready")
    assert error_of(response, 503)["message"] == "not ready: policy"
    assert response.headers["retry-after"] == "1"
    gateway.policy.is_ready, gateway.reward.is_ready = True, False
    assert error_of(gateway.infer.get("/health/ready"), 503)["message"] == "not ready: reward"
    assert gateway.stranger.get("/health/live").json() == {"status": "live"}


def test_metrics_count_by_route_and_never_by_what_clients_write(gateway: Gateway) -> None:
    gateway.infer.post("/v1/captions", json=CAPTION)
    gateway.infer.get("/v1/models/whatever-a-client-writes")
    gateway.infer.get("/whatever-a-client-writes")
    gateway.infer.request("WHATEVER", "/version")
    gateway.infer.post("/v1/rewards", json={"captions": ["a", "b"]})
    text = gateway.infer.get("/metrics").text
    assert 'mmrl_gateway_requests_total{method="POST",route="/v1/captions",status="200"} 1.0' in text
    assert 'route="/v1/models/{model}",status="404"} 1.0' in text
    assert 'mmrl_gateway_tokens_total{kind="prompt"} 7.0' in text
    assert 'mmrl_gateway_tokens_total{kind="completion"} 6.0' in text
    assert "mmrl_gateway_scored_captions_total 2.0" in text
    assert "mmrl_gateway_requests_under_way 1.0" in text
    assert gateway.meter.values["gateway_requests", "POST", "/v1/captions", "200"] == 1, "Ray hears the same"
    assert gateway.meter.values["gateway_tokens", "completion"] == 6
    assert gateway.meter.values["gateway_requests_under_way",] == 0
    assert "hatever" not in text
    assert "WHATEVER" not in text
