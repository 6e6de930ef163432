"""Pictures by URL: what may be asked, whom the connection goes to, and what the answer may be.

Names are resolved by a table. What would go to a public address goes to a server on this machine instead, and the
address that was asked for is kept, so that nothing here needs a network.
"""

from __future__ import annotations

import asyncio
import datetime
import gzip
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mmrl_ray.config.serving import RemoteImagesSection
from mmrl_ray.errors import ImageError
from mmrl_ray.serving.routes import pictures
from mmrl_ray.serving.routes.pictures import fetch_image, is_public
from tests.unit.data.pictures import picture

PNG = picture(5)
PUBLIC, OTHER = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
POLICY = RemoteImagesSection(enabled=True, allowed_domains=["img.example.com", "*.cdn.example.com"], timeout_s=20)
OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n%s" % (len(PNG), PNG)

Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


def policy(**changes: Any) -> RemoteImagesSection:
    return RemoteImagesSection.model_validate(POLICY.model_dump() | changes)


class World:
    """A resolver, a server, and the way from addresses to it."""

    def __init__(self, answer: Answer | bytes = OK, names: dict[str, Sequence[str]] | None = None) -> None:
        self.names = {"img.example.com": [PUBLIC]} if names is None else names
        self.resolved: list[tuple[str, int]] = []
        self.connected: list[str] = []
        self.requests: list[str] = []
        self.dead: set[str] = set()
        self.tls: ssl.SSLContext | None = None
        self.verify: ssl.SSLContext | bool = True
        self._answer = answer
        self._serving: list[asyncio.Task[None]] = []

    def fetch(self, url: str, policy: RemoteImagesSection = POLICY) -> bytes:
        async def go() -> bytes:
            self._serving = []
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
            port = server.sockets[0].getsockname()[1]
            try:
                return await fetch_image(url, policy, resolve=self._resolve, transport=_Detour(self, port))
            finally:
                server.close()
                if self._serving:
                    await asyncio.wait(self._serving, timeout=30)

        return asyncio.run(go())

    def refused(self, url: str, told: str, policy: RemoteImagesSection = POLICY) -> None:
        with pytest.raises(ImageError, match=told) as raised:
            self.fetch(url, policy)
        assert "\n" not in str(raised.value)

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved.append((host, port))
        if host not in self.names:
            raise OSError("no such name")
        return self.names[host]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.append(asyncio.current_task())  # type: ignore[arg-type]
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(head)
            answering = asyncio.ensure_future(self._write(head.split()[1], writer))
            left = asyncio.ensure_future(reader.read())
            await asyncio.wait({answering, left}, return_when=asyncio.FIRST_COMPLETED)
            answering.cancel()
            left.cancel()
            await asyncio.wait({answering, left})
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client had enough
        finally:
            writer.close()

    async def _write(self, path: str, writer: asyncio.StreamWriter) -> None:
        if isinstance(self._answer, bytes):
            writer.write(self._answer)
        else:
            await self._answer(path, writer)
        await writer.drain()


class _Detour(httpx.AsyncHTTPTransport):
    """Sends to the test's server what is meant for a public address."""

    def __init__(self, world: World, port: int) -> None:
        super().__init__(verify=world.verify, trust_env=False)
        self._world, self._port = world, port

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._world.connected.append(request.url.host)
        if request.url.host in self._world.dead:
            raise httpx.ConnectError("refused")
        scheme = request.url.scheme if self._world.tls else "http"
        request.url = request.url.copy_with(scheme=scheme, host="127.0.0.1", port=self._port)
        return await super().handle_async_request(request)


def answers(pages: dict[str, bytes]) -> Answer:
    async def answer(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(pages[path])

    return answer


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} x\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")


# -- what arrives ------------------------------------------------------------------------------------------------------


def test_fetches_from_the_address_that_was_checked() -> None:
    world = World(names={"img.example.com": [PUBLIC, OTHER]})
    assert world.fetch("https://IMG.example.com./a%20b.png?x=1&y=%2F#part") == PNG
    assert world.resolved == [("img.example.com", 443)]
    assert world.connected == [PUBLIC]
    (head,) = world.requests
    lines = head.lower().splitlines()
    assert head.startswith("GET /a%20b.png?x=1&y=%2F HTTP/1.1")
    assert "host: img.example.com" in lines
    assert "accept-encoding: identity" in lines
    assert not any(line.startswith(("cookie", "authorization", "referer")) for line in lines)


def test_the_next_address_is_tried_when_one_takes_no_connection() -> None:
    world = World(names={"img.example.com": [OTHER, PUBLIC]})
    world.dead = {OTHER}
    assert world.fetch("https://img.example.com/") == PNG
    assert world.connected == [OTHER, PUBLIC]
    world.dead = {OTHER, PUBLIC}
    world.refused("https://img.example.com/", "cannot be fetched: ConnectError")


@pytest.mark.parametrize("name", ["a.cdn.example.com", "a.b.cdn.example.com"])
def test_a_wildcard_allows_what_is_below_it(name: str) -> None:
    assert World(names={name: [PUBLIC]}).fetch(f"https://{name}?q") == PNG


def test_allowed_on_purpose() -> None:
    world = World()
    assert world.fetch("http://img.example.com:80/", policy(allow_http=True)) == PNG
    assert "host: img.example.com\r\n" in world.requests[0].lower()
    assert world.fetch(f"https://{PUBLIC}/", policy(allowed_domains=[PUBLIC])) == PNG
    assert world.fetch(f"https://[{OTHER}]/", policy(allowed_domains=[OTHER])) == PNG
    assert f"host: [{OTHER}]" in world.requests[-1].lower()
    assert world.resolved == [("img.example.com", 80)]


# -- what may not be asked ---------------------------------------------------------------------------------------------


def test_off_by_default() -> None:
    world = World()
    world.refused("https://img.example.com/", "are off here", RemoteImagesSection())
    world.refused("https://img.example.com/", "not allowed here", policy(allowed_domains=["other.example.com"]))
    assert (world.resolved, world.connected) == ([], [])


@pytest.mark.parametrize(
    "url",
    [
        "http://img.example.com/",
        "ftp://img.example.com/",
        "file:///etc/passwd",
        "gopher://img.example.com/",
        "//img.example.com/",
        "img.example.com/a.png",
        "https:img.example.com",
        "https:/img.example.com",
        "https:///img.example.com",
        "",
        "https://",
        "https://user@img.example.com/",
        "https://user:pass@img.example.com/",
        "https://img.example.com@169.254.169.254/",
        "https://169.254.169.254#@img.example.com/",
        "https://169.254.169.254\\@img.example.com/",
        "https://img.example.com\\.evil.com/",
        "https:\\\\img.example.com/",
        "https://img.example.com\\@169.254.169.254/",
        "https://img.example.com%2f@169.254.169.254/",
        "https://img%2eexample.com/",
        "https://img.example.com\t/",
        "https://img.example.com\r\nHost: x/",
        " https://img.example.com/",
        "https://img.example.com/a b",
        "https://img.example.com:22/",
        "https://img.example.com:80/",
        "https://img.example.com:0/",
        "https://img.example.com:/",
        "https://img.example.com:443x/",
        "https://ｉmg.example.com/",
        "https://img。example。com/",
        "https://img.example.com.evil.com/",
        "https://evilimg.example.com/",
        "https://cdn.example.com/",
        "https://.cdn.example.com/",
        "https://evilcdn.example.com/",
        "https://localhost/",
        "https://169.254.169.254/latest/meta-data/",
        "https://127.0.0.1/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.1/",
        "https://017700000001/",
        "https://0177.0.0.1/",
        "https://127.1/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:a9fe:a9fe]/",
        "https://[64:ff9b::a9fe:a9fe]/",
        "https://[fe80::1%25eth0]/",
        "https://[::",
        f"https://{PUBLIC}/",
        f"https://img.example.com/{'a' * 5000}",
        "https://img.example.com/\ud800",
        "https://img.example.com/é.png",
    ],
)
def test_refused_before_any_name_is_looked_up(url: str) -> None:
    world = World(names={})
    world.refused(url, "image URL")
    assert (world.resolved, world.connected) == ([], [])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "0x7f.1", "127.1", "0177.0.0.1", "169.254.169.254", "[::1]", "[::ffff:8.8.8.8]"]
)
def test_an_allow_list_does_not_open_private_addresses(host: str) -> None:
    world = World(names={host: [PUBLIC]})  # asked as a name, it would get through
    world.refused(f"https://{host}/", "not on the public internet", policy(allowed_domains=[host]))
    assert (world.resolved, world.connected) == ([], [])


# -- addresses ---------------------------------------------------------------------------------------------------------

PRIVATE = [
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "169.254.169.254",
    "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1",
    "198.51.100.7", "203.0.113.9", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::808:808", "64:ff9b:1::1", "100::1",
    "2001::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254",
    "fe80::1", "fe80::1%eth0", "2606:4700::1%eth0", "fec0::1", "ff02::1", "", "localhost", "127.1", "0177.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", PUBLIC, OTHER, "172.15.0.1", "172.32.0.1", "100.128.0.1", "2620:fe::fe", "2a00:1450::1"]
)
def test_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("addresses", [["10.0.0.1"], [PUBLIC, "127.0.0.1"], ["::ffff:127.0.0.1", PUBLIC], []])
def test_one_private_address_refuses_the_name(addresses: list[str]) -> None:
    world = World(names={"img.example.com": addresses})
    world.refused("https://img.example.com/", "'img.example.com': this host is not on the public internet")
    assert world.connected == []


def test_a_name_that_is_not_found() -> None:
    World(names={}).refused("https://img.example.com/", "'img.example.com': this host is not found")


def test_a_host_that_rebinds_is_asked_for_once() -> None:
    class Rebinding(World):
        async def _resolve(self, host: str, port: int) -> Sequence[str]:
            await super()._resolve(host, port)
            return [PUBLIC] if len(self.resolved) == 1 else ["127.0.0.1"]

    world = Rebinding()
    assert world.fetch("https://img.example.com/") == PNG
    assert (len(world.resolved), world.connected) == (1, [PUBLIC])
    hops = Rebinding(answers({"/": redirect("/again"), "/again": OK}))
    hops.refused("https://img.example.com/", "not on the public internet")
    assert hops.connected == [PUBLIC]


# -- redirects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_within_the_rules(status: int) -> None:
    pages = {"/a/b": redirect("../c?d", status), "/c?d": redirect("https://x.cdn.example.com/e", status), "/e": OK}
    world = World(answers(pages), {"img.example.com": [PUBLIC], "x.cdn.example.com": [OTHER]})
    assert world.fetch("https://img.example.com/a/b") == PNG
    assert world.connected == [PUBLIC, PUBLIC, OTHER]
    assert "host: x.cdn.example.com" in world.requests[-1].lower()


@pytest.mark.parametrize(
    "location",
    [
        "http://img.example.com/",
        "https://169.254.169.254/latest",
        "//127.0.0.1/",
        "https://evil.com/",
        "https://inside.cdn.example.com/",
        "/\\127.0.0.1/",
        "https://user@img.example.com/",
        "//[x",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "https://img.example.com:22/",
        "/a\tb",
        "/\xe9",
    ],
)
def test_a_redirect_is_checked_like_the_first_url(location: str) -> None:
    world = World(redirect(location), {"img.example.com": [PUBLIC], "inside.cdn.example.com": ["10.0.0.8"]})
    world.refused("https://img.example.com/", "image URL")
    assert world.connected == [PUBLIC]


def test_redirects_are_counted() -> None:
    world = World(redirect("/"))
    world.refused("https://img.example.com/", "more than 3 times")
    assert len(world.requests) == 4
    once = World(answers({"/": redirect("/a"), "/a": OK}))
    assert once.fetch("https://img.example.com/", policy(max_redirects=1)) == PNG
    World(redirect("/")).refused("https://img.example.com/", "more than 0 times", policy(max_redirects=0))


# -- answers -----------------------------------------------------------------------------------------------------------


def body(data: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *headers, "Connection: close", "", "")).encode() + data


BOMB = gzip.compress(b"\0" * 50_000_000)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (body(PNG, status="404 Not Found"), "answered 404 instead of 200"),
        (body(PNG, status="206 Partial Content"), "answered 206"),
        (body(b"", status="302 Found"), "answered 302"),
        (body(BOMB, "Content-Encoding: gzip", "Content-Type: image/png"), "in encoding 'gzip'"),
        (body(PNG, "Content-Encoding: br, gzip"), "in encoding"),
        (body(BOMB), "gzip data instead of an image"),
        (body(b"<svg/>"), "SVG instead"),
        (body(PNG[:20]), "broken PNG"),
        (body(PNG, f"Content-Length: {len(PNG) + 9}"), "cannot be fetched: RemoteProtocolError"),
        (body(b"", f"Content-Length: {2**40}"), "more than 10,485,760 bytes"),
        (b"nonsense\r\n\r\n", "cannot be fetched"),
        (b"", "cannot be fetched"),
        (body(b"", *(f"X-{n}: {'x' * 4000}" for n in range(100))), "cannot be fetched"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_bad_answer(answer: bytes, told: str) -> None:
    World(answer).refused("https://img.example.com/", told)


def test_bytes_are_counted_as_they_come() -> None:
    sent = 0

    async def endless(_: str, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(body(b""))
        while True:
            writer.write(b"\x89PNG" * 1024)
            await writer.drain()
            sent += 4096

    World(endless).refused("https://img.example.com/", "more than 100,000 bytes", policy(max_mb=100_000 / 2**20))
    assert sent < 50_000_000
    exact = policy(max_mb=len(PNG) / 2**20)
    assert World().fetch("https://img.example.com/", exact) == PNG
    World(body(PNG + b"x")).refused("https://img.example.com/", "more than", exact)


@pytest.mark.parametrize("where", ["head", "body", "silence"])
def test_a_slow_drip_is_cut_off(where: str) -> None:
    """Each byte comes soon after the last, so that no time-out between bytes ends it; after 5 s it would succeed."""

    async def drip(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write({"head": b"HTTP/1.1 200 OK\r\nX-Drip: ", "body": body(PNG), "silence": b""}[where])
        for _ in range(500):
            writer.write({"head": b"x", "body": b"\0", "silence": b""}[where])
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.write({"head": body(PNG)[15:], "body": b"", "silence": body(PNG)}[where])

    World(drip).refused("https://img.example.com/", "takes longer than 0.3 s", policy(timeout_s=0.3))


def test_a_name_server_that_is_silent_is_cut_off() -> None:
    class Silent(World):
        async def _resolve(self, host: str, port: int) -> Sequence[str]:
            await asyncio.Event().wait()
            raise AssertionError

    Silent().refused("https://img.example.com/", "takes longer than 0.1 s", policy(timeout_s=0.1))


def test_an_environment_with_a_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    transport = pictures._transport()
    assert type(transport._pool).__name__ == "AsyncConnectionPool"  # not AsyncHTTPProxy


# -- TLS ---------------------------------------------------------------------------------------------------------------


def certificate(folder: Path, name: str) -> Path:
    """A self-signed one with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "both.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.mark.parametrize(("name", "accepted"), [("img.example.com", True), ("other.example.com", False)])
def test_the_certificate_must_be_the_names_though_the_connection_goes_to_an_address(
    tmp_path: Path, name: str, accepted: bool
) -> None:
    path = certificate(tmp_path, name)
    asked: list[str | None] = []
    world = World()
    world.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    world.tls.load_cert_chain(path)
    world.tls.sni_callback = lambda _socket, server_name, _context: asked.append(server_name)
    world.verify = ssl.create_default_context(cafile=str(path))
    if accepted:
        assert world.fetch("https://img.example.com/") == PNG
    else:
        world.refused("https://img.example.com/", "cannot be fetched: ConnectError")
    assert asked == ["img.example.com"]
    world.verify = True  # signed by nobody
    world.refused("https://img.example.com/", "cannot be fetched: ConnectError")
