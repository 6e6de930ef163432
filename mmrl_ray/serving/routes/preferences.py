"""`/v1/preferences`: pairs of captions to label, and what raters say about them; for keys with the role feedback.

A rater is the key's name, and the request's `user` behind it where there is one. Which caption a rater sees first is
random, but the same whenever that rater asks for that pair; it is computed and recorded here, never taken on trust.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable
from typing import Annotated, Literal, Self, TypeVar

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field, model_validator

from mmrl_ray.data.images import image_format, image_hash
from mmrl_ray.errors import PreferenceStoreError
from mmrl_ray.preferences.schema import Choice, Pair, Preference, blinded
from mmrl_ray.preferences.store import PreferenceStore
from mmrl_ray.serving.auth import caller_id, caller_name
from mmrl_ray.serving.http_errors import problem
from mmrl_ray.serving.openai import Strict
from mmrl_ray.serving.routes.common import Tools, at_most, for_client, json_answer, read_json, takes_json

_LOG = logging.getLogger(__name__)
_PATH = "/v1/preferences"
_USER = r"^[A-Za-z0-9._@-]{1,63}$"
_User = Annotated[str | None, Query(pattern=_USER, description="Who of those that share the key.")]
_Ordered = Literal["first", "second", "tie"]
_CHOICES: dict[_Ordered, Choice] = {"first": "a", "second": "b", "tie": "tie"}
Answer = TypeVar("Answer")


class PreferenceRequest(Strict):
    """`POST /v1/preferences`: about a pair of the store by its id, or about a new one."""

    choice: _Ordered
    """`first` and `second` are the captions in the order in which they were shown."""
    pair: Annotated[str | None, Field(max_length=64)] = None
    """Id that `GET /v1/preferences/next` gave; its captions are in the order of that answer."""
    captions: Annotated[list[str] | None, Field(min_length=2, max_length=2)] = None
    """Without `pair`: the two, in the order in which they were shown."""
    image: str | None = None
    """Without `pair`: `data:image/png;base64,…`, or an `https://` URL where the server allows it."""
    image_hash: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None
    """In place of `image`, where the store has the picture already."""
    prompt: str = ""
    source: Annotated[str, Field(max_length=256)] = ""
    """Where the captions are from."""
    ratings: Annotated[list[float] | None, Field(min_length=2, max_length=2)] = None
    """Of the first and of the second, on the store's scale."""
    user: Annotated[str | None, Field(pattern=_USER)] = None
    """Who of those that share the key."""
    replace: bool = False
    """Take back what this rater said about the pair before."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        about_new = self.model_fields_set & {"captions", "image", "image_hash", "prompt", "source"}
        if (self.pair is None) == (self.captions is None) or (self.pair is not None and about_new):
            raise ValueError("send either `pair`, or `captions` with their picture")
        if self.pair is None and (self.image is None) == (self.image_hash is None):
            raise ValueError("send one of `image` and `image_hash` with the captions")
        return self


class PreferenceAnswer(BaseModel):
    """What was stored."""

    object: Literal["preference"] = "preference"
    id: str
    pair: str
    rater: str
    status: Literal["new", "same", "replaced"]
    """`same`: it was there already, word for word."""


class UndoneAnswer(BaseModel):
    """What was taken back."""

    object: Literal["preference"] = "preference"
    id: str
    pair: str
    """Which `GET /v1/preferences/next` gives this rater again."""
    rater: str
    status: Literal["undone"] = "undone"


class PairAnswer(BaseModel):
    """A pair to label."""

    object: Literal["preference.pair"] = "preference.pair"
    id: str
    prompt: str
    image: str
    """`data:image/png;base64,…`"""
    image_hash: str
    captions: list[str]
    """In the order in which to show them."""
    rating_scale: list[float]
    """Lowest and highest rating."""


def add_preferences(router: APIRouter, tools: Tools) -> None:
    """Adds the routes of `/v1/preferences`."""

    @router.get(
        f"{_PATH}/next",
        response_model=PairAnswer,
        responses={204: {"description": "This rater has labelled every pair."}},
        summary="A pair that this rater has not labelled",
    )
    async def next_pair(request: Request, user: _User = None) -> Response:
        store, rater = _store(tools), _rater(request, user)
        lease_s = tools.deps.settings.preference_lease_s
        pair = await _in_thread(tools, lambda: store.next_pair(rater, lease_s=lease_s))
        if pair is None:
            return Response(status_code=204)
        return json_answer(_shown(blinded(pair, rater), store))

    @router.post(
        _PATH,
        response_model=PreferenceAnswer,
        summary="Say which of two captions is better",
        **takes_json(PreferenceRequest),
    )
    async def prefer(request: Request) -> Response:
        store = _store(tools)
        body = await read_json(request, PreferenceRequest, tools.timeout_s)
        for text in (*(body.captions or ()), body.prompt):
            at_most("captions", len(text), tools.limits.max_text_chars, "characters")
        rater = _rater(request, body.user)
        async with for_client(request.receive, tools.timeout_s):
            urls = [[] if body.image is None else [body.image]]
            (images,) = await tools.pictures.decoded(urls, ["image"], caller_id(request))
        return json_answer(await _in_thread(tools, lambda: _write(store, body, rater, images[0] if images else None)))

    @router.delete(
        f"{_PATH}/{{id}}",
        response_model=UndoneAnswer,
        summary="Take back what this rater said last",
        description="`id` is the one that the last `POST` answered, so that a request that comes twice undoes once.",
    )
    async def undo(request: Request, id: str, user: _User = None) -> Response:
        store, rater = _store(tools), _rater(request, user)
        pair = await _in_thread(tools, lambda: store.undo(id, rater))
        if pair is None:
            raise problem(404, f"this rater has no preference {id[:64]!r}", code="preference_not_found", param="id")
        return json_answer(UndoneAnswer(id=id, pair=pair, rater=rater))


def _write(store: PreferenceStore, body: PreferenceRequest, rater: str, image: bytes | None) -> PreferenceAnswer:
    if body.pair is not None:
        pair = blinded(store.pair(body.pair), rater)
    else:
        assert body.captions is not None
        digest = image_hash([image]) if image is not None else body.image_hash or ""
        pair = Pair(digest, body.prompt, body.captions[0], body.captions[1], body.source, image)
    first, second = body.ratings or (None, None)
    said = Preference(pair, _CHOICES[body.choice], rater, first, second, shown_first="a")
    written = store.add([said], replace=body.replace)
    status: Literal["new", "same", "replaced"] = "new" if written.new else "replaced" if written.replaced else "same"
    return PreferenceAnswer(id=said.id, pair=pair.id, rater=rater, status=status)


def _shown(pair: Pair, store: PreferenceStore) -> PairAnswer:
    assert pair.image is not None
    kind = image_format(pair.image).lower()
    return PairAnswer(
        id=pair.id,
        prompt=pair.prompt,
        image=f"data:image/{kind};base64,{base64.b64encode(pair.image).decode()}",
        image_hash=pair.image_hash,
        captions=[pair.caption_a, pair.caption_b],
        rating_scale=list(store.rating_scale),
    )


def _store(tools: Tools) -> PreferenceStore:
    """The store behind this gateway; 404 where there is none."""
    if tools.deps.preferences is None:
        raise problem(
            404, "no preferences are collected here: serving.preferences is not set", code="preferences_not_served"
        )
    return tools.deps.preferences


def _rater(request: Request, user: str | None) -> str:
    name = caller_name(request)
    return name if user is None else f"{name}/{user}"


async def _in_thread(tools: Tools, work: Callable[[], Answer]) -> Answer:
    """The database's answer, without keeping other requests waiting.

    Raises:
        HTTPException: 503, it cannot be reached.
    """
    try:
        async with asyncio.timeout(tools.timeout_s):
            return await asyncio.to_thread(work)
    except PreferenceStoreError as error:
        _LOG.error("%s", error)
        raise problem(
            503,
            "preferences cannot be stored now: try again later",
            code="preferences_unavailable",
            type="server_error",
        ) from error
