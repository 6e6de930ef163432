"""What `Client` does with answers: which calls are made again and when, and which error an answer stands for."""

from __future__ import annotations

import email.utils
import random
import time
from typing import Any

import httpx
from tenacity import RetryCallState

from mmrl_ray.errors import (
    AccessError,
    DataError,
    ImageError,
    MMRLError,
    OverloadedError,
    RewardError,
    ServingError,
    UnknownImageError,
    UnknownModelError,
)

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
