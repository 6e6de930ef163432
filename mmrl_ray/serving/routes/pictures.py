"""Pictures of requests: data URIs, uploads and, where allowed, URLs; all looked at before they go anywhere.

A server that fetches what strangers name must not reach inside:

    URL ──strict syntax──▶ scheme, port ──allow-list──▶ resolve once ──every address public──▶ connect to that address
     ▲                                                                                              │
     └──────────────────────────── redirect: all of it again ◀──────────────────────────────────────┤
                                                                  bytes and time capped ──▶ look at its header

A name that resolves to something else a moment later changes nothing: the request goes to the address that was checked,
with the name only in `Host` and in TLS. Proxies of the environment are not used, for they would resolve again.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import urljoin

import httpx

from mmrl_ray import __version__
from mmrl_ray.config.serving import RemoteImagesSection, ServingSection
from mmrl_ray.data.images import ImageLimits, inspect_image
from mmrl_ray.errors import ImageError
from mmrl_ray.serving.http_errors import about, problem
from mmrl_ray.serving.images import RequestDecoder, Turns, check_image, decode_data_uri, is_data_uri

_What = TypeVar("_What", str, bytes)
_THREADS = 2
"""For base64 and digests, milliseconds a picture."""
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Addresses of a host name and port."""

_LONGEST_URL = 4096
_PORTS = {"https": 443, "http": 80}
_REDIRECTS = (301, 302, 303, 307, 308)
# What URL parsers read differently (user info, backslashes, escapes in the host, line breaks) does not match at all.
_URL = re.compile(
    r"(?P<scheme>[A-Za-z]+)://(?P<host>[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?][!-\[\]-~]*)?"
)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""A last label that makes browsers and `inet_aton` read the whole host as an IPv4 address."""
# Beside what `is_global` tells in every Python that is supported.
_REFUSED_V4 = (
    ipaddress.IPv4Network("100.64.0.0/10"),  # shared by carriers, and by some clouds for their metadata
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv4Network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.IPv4Network("168.63.129.16/32"),  # what Azure answers its own machines from
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""All that is routed. IPv4-mapped and -compatible, NAT64, unique and link-local addresses and multicast lie outside."""
_REFUSED_V6 = (
    ipaddress.IPv6Network("2001::/23"),  # Teredo and other protocols
    ipaddress.IPv6Network("2001:db8::/32"),
    ipaddress.IPv6Network("2002::/16"),  # 6to4
    ipaddress.IPv6Network("3fff::/20"),
)


class Pictures:
    """Turns what clients send into encoded files."""

    def __init__(self, settings: ServingSection) -> None:
        self.limits = ImageLimits(max_bytes=int(settings.limits.max_image_mb * 2**20))
        self._remote = settings.remote_images
        self._max_pixels = int(settings.limits.max_megapixels * 1e6)
        self._decoder = RequestDecoder(self.limits)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures")
        self._turns = Turns(_THREADS)

    async def at(self, urls: Sequence[str], params: Sequence[str], caller: str | None) -> tuple[bytes, ...]:
        """The encoded files of these URLs, in order, their headers looked at; whoever is sent them decodes them.

        Args:
            urls: data URIs, or where they are allowed others.
            params: where in the request each one stands.

        Raises:
            HTTPException: 400, one is broken, too large, refused or cannot be fetched, or they have too many pixels
                together.
        """
        found = await self._read(urls, params, caller)
        return tuple(found[url].data for url in urls)

    async def decoded(
        self, urls: Sequence[Sequence[str]], params: Sequence[str], caller: str | None
    ) -> list[tuple[bytes, ...]]:
        """The same for each of several items, of which `params` says where each stands, and every different picture is
        known to decode, in turn with those of other callers.

        Raises:
            HTTPException: as `at`, or one cannot be decoded.
            OverloadedError: the decoders are lost or busy.
        """
        places = [param for item, param in zip(urls, params, strict=True) for _ in item]
        flat = [url for item in urls for url in item]
        found = await self._read(flat, places, caller)
        first = dict(zip(reversed(flat), reversed(places), strict=True))
        for url, file in found.items():
            with about(first[url]):
                await self._decoder.check(file.data, file.digest, caller)
        return [tuple(found[url].data for url in item) for item in urls]

    async def uploaded(self, data: bytes, caller: str | None) -> bytes:
        """A file that was uploaded as `image`, its header looked at.

        Raises:
            HTTPException: 400, broken, too large, or of a format that is not accepted.
        """
        with about("image"):
            self._count([await self._in_thread(_File.of, data, caller)])
        return data

    async def _read(self, urls: Sequence[str], params: Sequence[str], caller: str | None) -> dict[str, _File]:
        """Each different one once."""
        found: dict[str, _File] = {}
        for url, param in zip(urls, params, strict=True):
            if url in found:
                continue
            with about(param):
                found[url] = await self._one(url, caller)
            self._count(found.values())
        return found

    async def _one(self, url: str, caller: str | None) -> _File:
        if is_data_uri(url):
            return await self._in_thread(lambda u, limits: _File.of(decode_data_uri(u, limits), limits), url, caller)
        return await self._in_thread(_File.of, await fetch_image(url, self._remote), caller)

    def _count(self, files: Iterable[_File]) -> None:
        pixels = sum({file.digest: file.pixels for file in files}.values())
        if pixels > self._max_pixels:
            raise problem(
                400,
                f"images of {pixels:,} pixels together: at most {self._max_pixels:,} are accepted in one request",
                code="above_limit",
            )

    async def _in_thread(
        self, function: Callable[[_What, ImageLimits], _File], what: _What, caller: str | None
    ) -> _File:
        loop = asyncio.get_running_loop()
        async with self._turns.turn(caller):
            return await loop.run_in_executor(self._threads, function, what, self.limits)


@dataclass(frozen=True, slots=True)
class _File:
    """One encoded picture."""

    data: bytes
    digest: bytes
    pixels: int

    @classmethod
    def of(cls, data: bytes, limits: ImageLimits) -> Self:
        return cls(data, hashlib.sha256(data).digest(), inspect_image(data, limits))


async def fetch_image(
    url: str,
    policy: RemoteImagesSection,
    *,
    resolve: Resolve | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> bytes:
    """The encoded picture at `url`, whose header is right.

    Args:
        resolve: asks the system by default.
        transport: what sends requests whose URL has an address for a host; a new one by default.

    Raises:
        ImageError: the URL, a redirect or an address is refused, the server fails or is too slow, or what it sends is
            no acceptable picture.
    """
    if not policy.enabled:
        raise ImageError("images by URL are off here: send the picture itself, as a data URI or an upload")
    # A transport alone, without the client around it, keeps no cookies, follows nothing and reads no environment.
    try:
        async with asyncio.timeout(policy.timeout_s), transport or _transport() as sender:
            data = await _follow(sender, url, policy, resolve or _resolve)
    except TimeoutError:
        raise ImageError(f"the image takes longer than {policy.timeout_s:g} s: send the picture itself") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"the image cannot be fetched: {type(error).__name__}; send the picture itself") from error
    return await asyncio.to_thread(check_image, data, ImageLimits(max_bytes=_max_bytes(policy)))


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet: not private, loopback, link-local, multicast, reserved, or a
    wrapping of IPv4 in IPv6 (mapped, NAT64, 6to4, Teredo), whatever it wraps."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        return ip in _GLOBAL_V6 and ip.scope_id is None and not any(ip in network for network in _REFUSED_V6)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in network for network in _REFUSED_V4))


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL that passed every check that needs no network."""

    scheme: str
    host: str
    """Lower case, without brackets or a final dot."""
    port: int
    target: str
    is_address: bool


def _max_bytes(policy: RemoteImagesSection) -> int:
    return int(policy.max_mb * 2**20)


async def _follow(sender: httpx.AsyncBaseTransport, url: str, policy: RemoteImagesSection, resolve: Resolve) -> bytes:
    for _ in range(policy.max_redirects + 1):
        target = _checked(url, policy)
        addresses = await _public_addresses(target, resolve)
        response = await _send(sender, target, addresses, policy.timeout_s)
        try:
            if response.status_code in _REDIRECTS and "location" in response.headers:
                url = _joined(url, response.headers["location"])
                continue
            return await _read(response, _max_bytes(policy))
        finally:
            await response.aclose()
    raise ImageError(f"image URL that redirects more than {policy.max_redirects} times: give the last one")


def _checked(url: str, policy: RemoteImagesSection) -> _Target:
    match = _URL.fullmatch(_plain(url).partition("#")[0])
    if match is None:
        raise ImageError("image URL that is not plain https://host/path: no user name, backslash or escaped host")
    scheme, host = match["scheme"].lower(), match["host"].lower().strip("[]").removesuffix(".")
    if scheme not in _PORTS or (scheme == "http" and not policy.allow_http):
        raise ImageError(f"image URL with {scheme}://: use https:// or send the picture itself")
    port = int(match["port"] or _PORTS[scheme])
    if port != _PORTS[scheme]:
        raise ImageError(f"image URL with port {port}: it is not allowed here")
    is_address = ":" in host or _NUMBER.fullmatch(host.rpartition(".")[2]) is not None
    if not any(_allows(entry, host) for entry in policy.allowed_domains):
        raise ImageError(f"image URL at {host!r}: this host is not allowed here; send the picture itself")
    target = match["target"] or "/"
    return _Target(scheme, host, port, target if target[0] == "/" else f"/{target}", is_address)


def _plain(url: str) -> str:
    """`url`, if nothing in it is dropped or rewritten by some parser."""
    if len(url) > _LONGEST_URL:
        raise ImageError(f"image URL of {len(url):,} characters: at most {_LONGEST_URL:,} are accepted")
    if "\\" in url or not all("!" <= character <= "~" for character in url):
        raise ImageError("image URL with a backslash, a space or something else than visible ASCII: escape it with %")
    return url


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, _plain(location))
    except ValueError as error:
        raise ImageError("image URL that redirects to something that is no URL") from error


def _allows(entry: str, host: str) -> bool:
    entry = entry.lower()
    if entry.startswith("*."):
        return host.endswith(entry[1:]) and len(host) > len(entry) - 1
    return host == entry.strip("[]").removesuffix(".")


async def _public_addresses(target: _Target, resolve: Resolve) -> list[str]:
    """All of them, every one checked: a name with one private address among public ones is refused."""
    if target.is_address:
        addresses: Sequence[str] = [target.host]
    else:
        try:
            addresses = await resolve(target.host, target.port)
        except (OSError, UnicodeError) as error:
            raise ImageError(f"image URL at {target.host!r}: this host is not found") from error
    if not addresses or not all(map(is_public, addresses)):
        raise ImageError(f"image URL at {target.host!r}: this host is not on the public internet")
    return list(dict.fromkeys(addresses))


async def _send(
    sender: httpx.AsyncBaseTransport, target: _Target, addresses: Sequence[str], timeout_s: float
) -> httpx.Response:
    """The answer, its body unread, of the first address that takes a connection."""
    headers = {
        "host": f"[{target.host}]" if ":" in target.host else target.host,
        "accept": "image/png, image/jpeg, image/webp, image/gif",
        "accept-encoding": "identity",
        "user-agent": f"mmrl_ray/{__version__}",
    }
    # An address that swallows packets must leave time for the next one.
    extensions: dict[str, Any] = {"timeout": {"connect": timeout_s / (len(addresses) + 1)}}
    if not target.is_address:
        extensions["sni_hostname"] = target.host  # certificates are checked against it, too
    for place, address in enumerate(addresses):
        url = httpx.URL(scheme=target.scheme, host=address, port=target.port, raw_path=target.target.encode())
        try:
            return await sender.handle_async_request(httpx.Request("GET", url, headers=headers, extensions=extensions))
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if place == len(addresses) - 1:
                raise
    raise AssertionError("there is an address, and the last one returns or raises")


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    if response.status_code != 200:
        raise ImageError(f"the image's server answered {response.status_code} instead of 200")
    # A compressed body may be a bomb, and none was asked for: pictures are compressed already.
    if (encoding := response.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise ImageError(f"the image's server sent it in encoding {encoding[:20]!r}, which was not asked for")
    too_large = f"the image at that URL has more than {max_bytes:,} bytes, which is the most accepted"
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise ImageError(too_large)
    data = bytearray()
    async for part in response.aiter_raw():
        data += part
        if len(data) > max_bytes:
            raise ImageError(too_large)
    return bytes(data)


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _transport() -> httpx.AsyncHTTPTransport:
    return httpx.AsyncHTTPTransport(verify=_tls(), trust_env=False, limits=httpx.Limits(max_connections=1))


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)
