"""`Client`: the gateway's own routes from Python, typed.

    with Client("http://127.0.0.1:8000", key="mmrl-…") as client:
        print(client.caption("photo.jpg").captions[0].text)
        print(client.rewards("photo.jpg", ["a dog on a beach"], references=["a dog by the sea"]).rewards[0].total)

For chat completions there is the official `openai` client. The functions below the class say which calls are made again
and when, and which error an answer stands for.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, retry_if_result, stop_after_attempt

from mmrl_ray import __version__
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
    one_line,
)

KEY_VARIABLE = "MMRL_API_KEY"
"""Environment variable with the key, so that it need not stand in code or on a command line."""

Image = bytes | str | os.PathLike[str]
"""An encoded picture, or the path of one."""
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 30.0
_BUSY = (429, 503)
_BY_CODE: dict[str, type[MMRLError]] = {
    "model_not_found": UnknownModelError,
    "image_not_found": UnknownImageError,
    "invalid_image": ImageError,
    "reward_failed": RewardError,
}
_BY_STATUS: dict[int, type[MMRLError]] = {
    400: DataError,
    401: AccessError,
    403: AccessError,
    413: DataError,
    422: DataError,
    429: OverloadedError,
    503: OverloadedError,
}


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption."""

    text: str
    finish_reason: str
    """`stop`, or `length` where it was cut at the most tokens."""


@dataclass(frozen=True, slots=True)
class Captions:
    """What an image was said to show."""

    captions: tuple[Caption, ...]
    model: str
    version: int
    """Training step of the adapter that answered; 0 for a base model."""
    image_hash: str
    """Hex SHA-256 of the image."""


@dataclass(frozen=True, slots=True)
class Reward:
    """What one caption earned, and from what."""

    total: float | None
    """None where the caption could not be scored: see `error`."""
    parts: Mapping[str, float]
    weights: Mapping[str, float]
    sigma: float | None
    """Standard deviation of the total where the reward has a model of its own noise."""
    error: str | None = None
    """Why the caption has no reward; the others of its request have theirs."""


@dataclass(frozen=True, slots=True)
class Rewards:
    """What the captions of one image earned, in their order."""

    rewards: tuple[Reward, ...]
    version: str
    """Of the reward: changes with whatever can change a score."""
    image_hash: str | None
    """Good in place of the image from now on, as long as the reward remembers it."""


@dataclass(frozen=True, slots=True)
class Model:
    """One that is served."""

    id: str
    created: int
    """Unix seconds."""
    root: str
    """Id of the base model that it runs on."""
    parent: str | None
    """Id of the model an adapter was trained on; None for a base."""
    step: int
    """Training step of its newest version."""


class Client:
    """Calls one gateway; safe to use from several threads.

    A call that found the gateway busy (429, 503) or lost its connection is made again, after what `Retry-After` says
    or after a time that doubles, with some jitter: no call changes anything there. Every method raises

        AccessError          no key, a wrong one, or one without the role
        DataError            this request is refused; `ImageError` for its picture
        UnknownModelError    no such model is served; `UnknownImageError`: no picture of that hash is remembered
        OverloadedError      still busy after the last try, or for longer than a client should wait
        RewardError          the reward as a whole failed, or by `score` a caption of several
        ServingError         no gateway there, a failure in it, or no answer in time
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = 120.0,
        retries: int = 5,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connects with the first call.

        Args:
            url: the gateway's, with or without `/v1`.
            key: by default what the environment variable MMRL_API_KEY holds.
            timeout_s: of one try.
            retries: tries after the first.
            transport: what sends requests; for tests.
            sleep: waits between tries.

        Raises:
            ConfigError: no `http://` or `https://` URL, or a key with characters that no key has.
        """
        key = (key if key is not None else os.environ.get(KEY_VARIABLE, "")).strip()
        if not all("!" <= character <= "~" for character in key):
            raise ConfigError("the key has spaces or other characters that no key has: copy it again")
        try:
            parsed = httpx.URL(url.rstrip("/").removesuffix("/v1"))
        except httpx.InvalidURL as error:
            raise ConfigError(f"gateway {url!r} is no URL ({error}): write http://host:port") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"gateway {url!r}: write http://host:port or https://host")
        self._url = str(parsed)
        self._http = httpx.Client(
            base_url=parsed,
            headers={"user-agent": f"mmrl_ray/{__version__}"} | ({"authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx.Limits(max_connections=None),
            transport=transport,
        )
        self._timeout_s = timeout_s
        self._retrying = Retrying(
            retry=retry_if_result(may_pass) | retry_if_exception(lost),
            stop=stop_after_attempt(retries + 1),
            wait=wait_s,
            sleep=sleep,
            retry_error_callback=lambda state: state.outcome.result(),  # type: ignore[union-attr]  # or raises
        )

    def __repr__(self) -> str:
        return f"Client({self._url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of its connections."""
        self._http.close()

    def caption(
        self,
        image: Image,
        *,
        model: str | None = None,
        prompt: str | None = None,
        n: int = 1,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Captions:
        """`n` captions of one image; what is not given is the gateway's own choice."""
        options = {
            "model": model,
            "prompt": prompt,
            "n": n,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        fields = {name: str(value) for name, value in options.items() if value is not None}
        answer = self._call("POST", "/v1/captions", data=fields, files={"image": ("image", _read(image))})
        with _explained(self._url):
            return Captions(
                captions=tuple(Caption(each["text"], each["finish_reason"]) for each in answer["captions"]),
                model=answer["model"],
                version=answer["version"],
                image_hash=answer["image_hash"],
            )

    def rewards(
        self,
        image: Image | None,
        captions: Sequence[str],
        *,
        references: Sequence[str] = (),
        prompt: str | None = None,
        image_hash: str | None = None,
    ) -> Rewards:
        """What each caption of one image earns; `image_hash` names a picture that was sent before."""
        item: dict[str, Any] = {"captions": list(captions), "references": list(references)}
        if image is not None:
            item["image"] = _data_uri(_read(image))
        if image_hash is not None:
            item["image_hash"] = image_hash
        if prompt is not None:
            item["prompt"] = prompt
        answer = self._call("POST", "/v1/rewards", json={"inputs": [item]})
        with _explained(self._url):
            (scored,) = answer["data"]
            by_place = {each["index"]: each for each in scored["rewards"]}
            return Rewards(
                rewards=tuple(
                    Reward(each["total"], each["parts"], each["weights"], each["sigma"], _reason(each.get("error")))
                    for each in (by_place[place] for place in range(len(captions)))
                ),
                version=answer["version"],
                image_hash=scored["image_hash"],
            )

    def score(self, image: Image, captions: Sequence[str], *, references: Sequence[str] = ()) -> tuple[float, ...]:
        """The total of each caption's reward alone, by the route that vLLM has, too."""
        picture = {"type": "image_url", "image_url": {"url": _data_uri(_read(image))}}
        query = {"content": [picture, *({"type": "text", "text": text} for text in references)]}
        documents = [{"content": [{"type": "text", "text": text}]} for text in captions]
        answer = self._call("POST", "/v1/score", json={"queries": query, "documents": documents})
        with _explained(self._url):
            scores = {each["index"]: float(each["score"]) for each in answer["data"]}
            return tuple(scores[place] for place in range(len(captions)))

    def models(self) -> tuple[Model, ...]:
        """What is served: the base first, then adapters by id."""
        answer = self._call("GET", "/v1/models")
        with _explained(self._url):
            return tuple(
                Model(each["id"], each["created"], each["root"], each["parent"], each["step"])
                for each in answer["data"]
            )

    def ready(self) -> bool:
        """Whether the gateway is there and would answer: its model is warmed up and its reward reachable."""
        try:
            response = self._http.get("/health/ready")
        except httpx.TransportError:
            return False
        if response.status_code == 503:
            return False
        answer_of(response, self._url)
        return True

    def version(self) -> str:
        """Of the mmrl_ray that serves."""
        answer = self._call("GET", "/version")
        with _explained(self._url):
            return str(answer["version"])

    def _call(self, method: str, path: str, **content: Any) -> Any:
        try:
            response = self._retrying(self._http.request, method, path, **content)
        except httpx.TimeoutException as error:
            raise ServingError(
                f"{self._url}: no answer within {self._timeout_s:g} s ({type(error).__name__})"
            ) from error
        except httpx.TransportError as error:
            reason = one_line(error) or type(error).__name__
            raise ServingError(f"{self._url}: {reason}; is a gateway running there?") from error
        return answer_of(response, self._url)


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        raise ServingError(f"{url} answered in an unknown shape ({error!r}): is it of this version?") from error


def _read(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"image {os.fspath(image)} cannot be read: {error.strerror or error}") from error


def _reason(error: Mapping[str, str] | None) -> str | None:
    return None if error is None else error["message"]


def _data_uri(data: bytes) -> str:
    from mmrl_ray.data.images import image_format

    return f"data:image/{image_format(data).lower()};base64,{base64.b64encode(data).decode()}"


def may_pass(response: httpx.Response) -> bool:
    """Whether the same call may succeed in a while that a client can wait."""
    return response.status_code in _BUSY and (_retry_after_s(response) or 0.0) <= _LONGEST_WAIT_S


def lost(error: BaseException) -> bool:
    """Whether the connection could not be made, or broke; a gateway that only takes long is not asked again."""
    slow = isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout)
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol) and not slow


def wait_s(state: RetryCallState) -> float:
    """Before the next try. The jitter keeps clients that were refused together from coming back together."""
    asked = None
    if state.outcome is not None and not state.outcome.failed:
        asked = _retry_after_s(state.outcome.result())
    if asked is not None:
        return asked * random.uniform(1.0, 1.25)
    return min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (state.attempt_number - 1)) * random.uniform(0.5, 1.0)


def _retry_after_s(response: httpx.Response) -> float | None:
    """What `Retry-After` asks for, in seconds or as a date; None where it says nothing sensible."""
    text = response.headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def answer_of(response: httpx.Response, url: str) -> Any:
    """The answer, or its error as one of the project's own."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.status_code == 200 and body is not None:
        return body
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or "message" not in error:
        raise _BY_STATUS.get(response.status_code, ServingError)(
            f"{url} answered {response.status_code} without a word of a gateway: is it one?"
        )
    kind = _BY_CODE.get(str(error.get("code"))) or _BY_STATUS.get(response.status_code, ServingError)
    raise kind(" ".join(str(error["message"]).split()))
