"""Pictures that came over HTTP, as data URIs or uploads: checked by their headers, decoded, and by turns of callers.

Encoded pictures travel (a photograph has 4 MB, its pixels 36): the policy decodes what it is sent, the gateway looks at
headers alone. What goes to a reward or into a store is decoded by the gateway, once a distinct picture. A decoding is
cancelled with its request (`RequestDecoder`).

`Turns` are places that callers share: whoever holds the fewest is next, nobody holds all, and some rest in between.
"""

from __future__ import annotations

import asyncio
import binascii
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from mmrl_ray.data.decoder_pool import DecoderPool, Decoding, SharedPicture, background_pool, shared_pool
from mmrl_ray.data.images import DEFAULT_LIMITS, ImageLimits, inspect_image
from mmrl_ray.errors import ImageError, OverloadedError, ProcessError

_UNTYPED = ("", "application/octet-stream", "binary/octet-stream")
"""What clients declare that know no type; the content tells, as it does where they declare a wrong one."""
_LONGEST_HEADER = 256
"""Characters before a data URI's comma; a type with a few parameters has 64."""
_BLANKS = b" \t\r\n\f"
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
"""From base64's alphabet for URLs (RFC 4648, section 5)."""
_Found = TypeVar("_Found")
_QUICK_PIXELS = 4_000_000
_QUICK_BYTES = 2**20
"""A picture above either may take seconds: those have decoders of their own, which give way to the model."""
_QUICK, _SLOW = 3, 2
"""Decoded at a time of either kind, all but one of them for one caller: another one's never wait for it."""
_KNOWN = 4096
"""Pictures whose verdict is remembered, 100 bytes each."""


def is_data_uri(url: str) -> bool:
    """Whether a URL carries its picture itself."""
    return url[:5].lower() == "data:"


def decode_data_uri(uri: str, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The encoded picture in `data:image/png;base64,…`, whose header is right; its pixels nobody has seen yet.

    A large one takes some 30 ms: call it off the event loop.

    Raises:
        ImageError: not such a URI, not base64, declared as something else than a picture, or whatever `inspect_image`
            refuses. Which kind of picture is declared does not matter: the content decides.
    """
    header, comma, payload = uri.partition(",")
    if not is_data_uri(uri) or not comma or len(header) > _LONGEST_HEADER:
        raise ImageError("not a data URI of an image: write data:image/png;base64,<the file in base64>")
    mime, *parameters = (part.strip() for part in header[len("data:") :].lower().split(";"))
    if parameters[-1:] != ["base64"]:
        raise ImageError(f"data URI {header[:64]!r}: ;base64 must stand before its comma, and base64 behind it")
    if mime not in _UNTYPED and not mime.startswith("image/"):
        raise ImageError(f"data URI of type {mime[:64]!r}, which is no image: write data:image/png;base64,<the file>")
    return check_image(_decode_base64(payload, limits.max_bytes), limits)


def check_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """`data` itself, after a look at its header; for uploads, whose declared type is only a file name's.

    Raises:
        ImageError: whatever `inspect_image` refuses.
    """
    inspect_image(data, limits)
    return data


def _decode_base64(text: str, max_bytes: int) -> bytes:
    """Of base64 as clients write it: either alphabet, with line breaks or blanks, its padding there or left out."""
    # strict_mode: no characters outside the alphabet, no wrong padding, nothing after it.
    wrong = "data URI whose content is no base64 (RFC 4648)"
    try:
        raw = text.encode("ascii").translate(_TO_STANDARD, _BLANKS)
    except UnicodeEncodeError:
        raise ImageError(wrong) from None
    # Four characters hold three bytes; measured before they are decoded.
    if len(raw) // 4 * 3 > max_bytes + 2:
        raise ImageError(
            f"image of about {len(raw) // 4 * 3:,} bytes: at most {max_bytes:,} are accepted; make it smaller"
        )
    if not raw.endswith(b"="):
        raw += b"=" * (-len(raw) % 4)
    try:
        return binascii.a2b_base64(raw, strict_mode=True)
    except binascii.Error:
        raise ImageError(wrong) from None


class RequestDecoder:
    """Used from one event loop at a time."""

    def __init__(self, limits: ImageLimits = DEFAULT_LIMITS, pool: DecoderPool | None = None) -> None:
        """`pool` is by default the one of this process."""
        self._limits = limits
        self._pools = (lambda: pool, lambda: pool) if pool is not None else (shared_pool, background_pool)
        self._threads = ThreadPoolExecutor(_QUICK + _SLOW, thread_name_prefix="decode")
        self._turns = Turns(_QUICK), Turns(_SLOW)
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        """By digest: what is wrong with a picture, or None."""
        self._under_way: dict[bytes, _Check] = {}

    @asynccontextmanager
    async def decoded(self, images: Sequence[bytes], caller: str | None = None) -> AsyncIterator[list[SharedPicture]]:
        """The pictures, each distinct one decoded once; what is done with them inside has its turn, too.

        Raises:
            ImageError: one is broken or refused.
            OverloadedError: the decoders are lost or busy.
        """
        slow = max((self._is_slow(image) for image in images), default=False)  # a look at each one's header
        async with self._turns[slow].turn(caller):
            pool = self._pools[slow]()
            found = {image: await self._run(pool.decode_shared, image) for image in dict.fromkeys(images)}
            yield [found[image] for image in images]

    async def check(self, data: bytes, digest: bytes, caller: str | None = None) -> None:
        """Decodes a picture, unless it or one of the same digest was decoded before or is being.

        Raises:
            ImageError: it is broken or refused.
            OverloadedError: the decoders are lost or busy.
        """
        if digest in self._known:
            self._known.move_to_end(digest)
            if (wrong := self._known[digest]) is not None:
                raise ImageError(wrong)
            return
        check = self._under_way.get(digest)
        if check is None:
            check = self._under_way[digest] = _Check(asyncio.create_task(self._checked(data, digest, caller)))
        check.waiting += 1
        try:
            await asyncio.shield(check.task)
        finally:
            check.waiting -= 1
            if not check.waiting:
                check.task.cancel()  # a finished one takes no notice
                self._under_way.pop(digest, None)

    async def _checked(self, data: bytes, digest: bytes, caller: str | None) -> None:
        try:
            slow = self._is_slow(data)
            async with self._turns[slow].turn(caller):
                await self._run(self._pools[slow]().check, data)
        except ImageError as error:
            self._remember(digest, str(error))
            raise
        else:
            self._remember(digest, None)

    def _remember(self, digest: bytes, wrong: str | None) -> None:
        self._known[digest] = wrong
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    def _is_slow(self, image: bytes) -> bool:
        return inspect_image(image, self._limits) > _QUICK_PIXELS or len(image) > _QUICK_BYTES

    async def _run(self, function: Callable[..., _Found], data: bytes) -> _Found:
        decoding = Decoding()
        work = partial(function, data, limits=self._limits, decoding=decoding)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except asyncio.CancelledError:
            decoding.give_up()
            raise
        except ProcessError as error:
            raise OverloadedError(f"a picture could not be decoded now ({error}): try again later") from error


@dataclass(slots=True)
class _Check:
    """One decoding that several requests wait for; cancelled with the last of them."""

    task: asyncio.Task[None]
    waiting: int = 0


class Turns:
    """Used from one event loop at a time."""

    def __init__(self, places: int, *, most: int | None = None) -> None:
        """`places` may be held at a time, `most` of them by one caller: by default all but one, of several."""
        self._free = places
        self._most = max(1, places - 1) if most is None else most
        self._held: Counter[str | None] = Counter()
        self._waiting: list[tuple[str | None, asyncio.Future[None]]] = []
        self._last: dict[str | None, int] = {}
        """By caller that waits or holds a place, when it was handed one last."""
        self._handed = 0
        self._rested: dict[str | None, float] = {}
        """By caller that rests, when it may go on: `loop.time`, the same clock in every loop."""
        self._timer: asyncio.TimerHandle | None = None
        """For the first one that waits and rests."""

    @asynccontextmanager
    async def turn(self, caller: str | None, *, rest: float = 0.0) -> AsyncIterator[None]:
        """Holds a place inside; the caller's next one comes `rest` times as long after it as it was held."""
        await self._take(caller)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            yield
        finally:
            if rest > 0:
                now = loop.time()
                self._rested[caller] = max(self._rested.get(caller, 0.0), now + rest * (now - began))
            self._give_back(caller)

    async def _take(self, caller: str | None) -> None:
        place = asyncio.get_running_loop().create_future()
        self._waiting.append((caller, place))
        self._hand_out()
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._waiting.remove((caller, place))
            else:  # it was handed out at the same moment
                self._give_back(caller)
            raise

    def _give_back(self, caller: str | None) -> None:
        self._free += 1
        self._held[caller] -= 1
        self._hand_out()
        if not self._held[caller]:  # callers come and go
            del self._held[caller]
            if all(waiting != caller for waiting, _ in self._waiting):
                self._last.pop(caller, None)

    def _hand_out(self) -> None:
        """To the caller with the fewest places, of several to who had the last one longest ago, in its own order."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._rested = {caller: end for caller, end in self._rested.items() if end > now}
        while self._free:
            able = [
                (c, place)
                for c, place in self._waiting
                if self._held[c] < self._most and c not in self._rested and not place.done()
            ]
            if not able:
                break
            caller, place = min(able, key=lambda each: (self._held[each[0]], self._last.get(each[0], 0)))
            self._handed += 1
            self._last[caller] = self._handed
            self._waiting.remove((caller, place))
            self._held[caller] += 1
            self._free -= 1
            place.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        ends = [self._rested[caller] for caller, _ in self._waiting if caller in self._rested]
        # A loop's timers may come up to its clock's resolution early.
        self._timer = loop.call_at(min(ends) + 0.001, self._hand_out) if ends else None
