"""A policy that answers many requests at once: what the policy deployment is a shell around, and its metrics.

    request ──decode, encode──▶ waiting ──▶ decode thread: rows join and leave between steps ──▶ choices, deltas

The event loop only passes things on: pictures are decoded in processes of their own (`images.py`), prompts are made in
others where there are some (`policy/prompt_pool.py`) and else in a small pool of threads, and the model runs in one
thread of its own (`decode_thread.py`). A request keeps the version of the adapter that it began with, and a new version
is put on beside it (`policy/lora/pool.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from PIL import Image

from mmrl_ray.data.decoder_pool import SharedPicture, images_of
from mmrl_ray.data.images import decode_image, encode_png
from mmrl_ray.errors import (
    ConfigError,
    ContextLengthError,
    DataError,
    OverloadedError,
    ProcessError,
    ServingError,
    UnknownModelError,
)
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams
from mmrl_ray.policy.generation.base import DecodeRequest
from mmrl_ray.policy.generation.decode import Decoder, decode_groups
from mmrl_ray.policy.generation.queue import GroupBook
from mmrl_ray.policy.generation.rules import generation_rules
from mmrl_ray.policy.generation.sampling import check_sampling
from mmrl_ray.policy.generation.vllm.decoder import VllmServer
from mmrl_ray.policy.lora.pool import AdapterPool, Resident
from mmrl_ray.policy.lora.routing import BASE
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import choose_path
from mmrl_ray.policy.prompt_pool import PromptPool
from mmrl_ray.policy.prompts import check_context, conversation_source, encode_conversation
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.serving.adapters import AdapterLeases
from mmrl_ray.serving.decode_thread import Answers, DecodeThread, Ticket
from mmrl_ray.serving.images import RequestDecoder, Turns
from mmrl_ray.serving.protocols import Delta, Generated, GenerateRequest, ModelInfo, Served
from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.meter import Meter, Totals

logger = logging.getLogger(__name__)

_ENCODERS = 2
_ABOUT_S = 1.0
"""So long after its last request a caller may be about to ask again."""
_REST = 3
"""While others are about, a caller's next prompt is encoded so many times as long after its last one as that took: a
client that leaves before its first token has no other cost, and Python has one interpreter for it and the model."""
_FOR_OTHERS = 4
"""One caller leaves one in so many of the places to wait free."""
_WARM_UP_SIDE = 128
_WARM_UP_TOKENS = 4
# What a request may raise as it is; anything else becomes a `ServingError`.
_OWN_ERRORS = (DataError, ContextLengthError, ConfigError, ServingError)
_COUNTERS = {
    "requests": table.POLICY_REQUESTS,
    "failed_requests": table.POLICY_FAILED,
    "tokens": table.POLICY_TOKENS,
}


class Engine:
    """`PolicyService` in this process."""

    def __init__(
        self,
        policy: Policy,
        pool: AdapterPool | None,
        *,
        model_id: str,
        created: int,
        vision_cache_bytes: int,
        max_rows: int,
        max_queue: int,
        timeout_s: float,
        threads: int = 1,
        prompt_processes: int = 0,
        vllm: VllmServer | None = None,
    ) -> None:
        """Takes over `policy` and `vllm`; nothing runs before `start`.

        Args:
            policy: without an adapter where there is a pool.
            pool: the adapters that can be asked for beside the base; None serves the policy as it is.
            model_id: what the base, or the policy as it is, is asked for by.
            created: its Unix seconds.
            vision_cache_bytes: how much of vision features is kept.
            max_rows: completions decoded at the same time.
            max_queue: requests that may wait for their first token; one more is refused at once.
            timeout_s: a request that takes longer ends with an error.
            threads: that compute a pass of the model's.
            prompt_processes: that make prompts beside the decode thread; with 0 threads of this process do.
            vllm: samples in the place of the policy's own model, of which a skeleton will do then.

        Raises:
            ModelError: the checkpoint's generation config holds what cannot be obeyed.
        """
        self._policy = policy
        self._pool = pool
        self._model_id = model_id
        self._created = created
        self._max_rows = max_rows
        self._max_queue = max_queue
        self._timeout_s = timeout_s
        self._cache = VisionCache(vision_cache_bytes)
        self._rules = generation_rules(policy) if vllm is None else None  # vLLM's process has them
        self._vllm = vllm
        self._thread = DecodeThread(self._make_decoder, threads)
        encoders = prompt_processes or min(_ENCODERS, os.cpu_count() or 1)
        self._encoders = ThreadPoolExecutor(encoders, "encode", torch.set_num_threads, (1,))
        self._prompts = PromptPool(policy, prompt_processes)
        self._decoder = RequestDecoder()
        self._leases = AdapterLeases(pool, self._thread) if pool is not None else None
        self._turns = Turns(prompt_processes or _ENCODERS)
        self._present: dict[object, str | None] = {}
        """Requests that have not ended, with their callers; the event loop's."""
        self._left: dict[str | None, float] = {}
        """By caller, when its last request ended: `time.monotonic`, of the last second."""
        self._waiting: dict[object, str | None] = {}
        """Those of them without a first token, with their callers; the decode thread takes them out."""
        self._answers = Answers(policy.tokenizer)
        self._requests = 0
        self._warm = False

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the decode thread, warms the model up and loads as many adapters as fit. Blocks until then.

        Raises:
            MMRLError: the model cannot answer.
        """
        self._thread.start()
        turns, picture = (("user", (0, "a")),), _picture()
        prompt = self._with_source(encode_conversation(self._policy, turns, (picture,)), turns, [decode_image(picture)])
        self._thread.call(partial(self._warm_up, prompt)).result()
        self._prompts.wait()
        if self._leases is not None:
            self._leases.start()
        self._warm = True

    def close(self) -> None:
        """Ends the decode thread; requests that are left get an error."""
        self._warm = False
        self._thread.stop()
        self._encoders.shutdown(cancel_futures=True)
        self._prompts.close()
        if self._leases is not None:
            self._leases.close()
        if self._vllm is not None:
            self._vllm.close()

    @property
    def healthy(self) -> bool:
        """False when only a new process can help."""
        return self._thread.healthy and (self._vllm is None or self._vllm.process.alive)

    async def ready(self) -> bool:
        """Whether the model is loaded and warmed up."""
        return self._warm and self.healthy

    async def refresh(self) -> None:
        """Looks for new adapters and new versions, and puts new versions of loaded adapters on the model."""
        if self._leases is not None:
            await self._leases.refresh()

    # -- service ---------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> Generated:
        """All choices, finished. Cancelling the call frees its rows."""
        with self._counted(request.caller) as mark, _own_errors():
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._generate(request, mark)
            except TimeoutError as error:
                raise self._too_slow() from error

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Served | Delta]:
        """`Served`, then deltas. Nothing comes before the first token: until then an error is the answer's own."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        with self._counted(request.caller) as mark, _own_errors():
            resident = None
            ticket = None
            try:
                async with asyncio.timeout_at(deadline):
                    resident = await self._lease(request.model)
                    ticket = await self._ticket(request, resident, mark, streams=True)
                self._thread.submit(ticket)
                begun = False
                while ticket.output is None or ticket.events:
                    # Around each wait, not the whole: a time-out must not strike while the caller is at work.
                    async with asyncio.timeout_at(deadline):
                        await ticket.news.wait()
                    if not begun and ticket.error is None:
                        begun = True
                        yield self._served(request, resident, ticket.prompt)
                    for delta in self._answers.deltas(ticket.read()):
                        yield delta
                    if ticket.error is not None:
                        raise ticket.error
            except TimeoutError as error:
                raise self._too_slow() from error
            finally:
                self._let_go(ticket, resident)

    async def models(self) -> list[ModelInfo]:
        """The base first, then adapters by id."""
        base = ModelInfo(self._model_id, self._created, root=self._model_id, parent=None, version=0)
        adapters = self._pool.infos() if self._pool is not None else []
        root = self._model_id
        return [
            base,
            *(ModelInfo(a.id, a.version.created, root, parent=root, version=a.version.step) for a in adapters),
        ]

    def stats(self) -> dict[str, float]:
        """Numbers for metrics: what there is now, and what there was since the start."""
        decoder = self._thread.decoder
        encoded, hits = self._cache.misses, self._cache.hits
        if self._vllm is not None:  # where vLLM's processor has made pixels, and where it had them
            hits = decoder.counters["mm_cache_hits"]
            encoded = decoder.counters["mm_cache_queries"] - hits
        return {
            "waiting_requests": len(self._waiting),
            "running_requests": max(0, len(self._present) - len(self._waiting)),
            "running_rows": decoder.running_rows,
            "requests": self._requests,
            "failed_requests": self._thread.failed,
            "tokens": self._thread.tokens,
            "images_encoded": encoded,
            "vision_cache_hits": hits,
            "vision_cache_bytes": self._cache.nbytes,
            **{f"decode_{name}": count for name, count in decoder.counters.items()},
        }

    # -- one request -----------------------------------------------------------------------------------------------

    async def _generate(self, request: GenerateRequest, mark: object) -> Generated:
        resident = None
        ticket = None
        try:
            resident = await self._lease(request.model)
            ticket = await self._ticket(request, resident, mark, streams=False)
            self._thread.submit(ticket)
            await ticket.news.wait()
            if ticket.output is None:
                raise ticket.error or ServingError("the request ended without an answer")
            choices = tuple(self._answers.choice(i, made) for i, made in enumerate(ticket.output.completions))
            return Generated(self._served(request, resident, ticket.prompt), choices)
        finally:
            self._let_go(ticket, resident)

    @contextmanager
    def _counted(self, caller: str | None) -> Iterator[object]:
        """Counts a request: as waiting until its first token."""
        if not (self._warm and self.healthy):
            raise OverloadedError("the policy is not ready; try again later")
        waiting = list(self._waiting.values())
        if len(waiting) >= self._max_queue:
            raise OverloadedError(f"{len(waiting)} requests are waiting already; try again later")
        mine = waiting.count(caller)
        if caller is not None and mine >= self._max_queue - self._max_queue // _FOR_OTHERS:
            raise OverloadedError(f"{mine} requests of this key are waiting already; try again later")
        mark = object()
        self._requests += 1
        self._present[mark] = caller
        self._waiting[mark] = caller
        try:
            yield mark
        finally:
            self._waiting.pop(mark, None)
            del self._present[mark]
            self._left[caller] = time.monotonic()

    async def _lease(self, model: str) -> Resident | None:
        """The version of the adapter that the request takes; None for the base."""
        if model == self._model_id:
            return None
        if self._leases is None:
            raise UnknownModelError(f"no model {model[:64]!r} is served here; there is {self._model_id!r}")
        return await self._leases.take(model)

    async def _ticket(
        self, request: GenerateRequest, resident: Resident | None, mark: object, *, streams: bool
    ) -> Ticket:
        if not 1 <= request.n <= self._max_rows:
            raise ConfigError(f"n={request.n} completions: from 1 to {self._max_rows} can be asked for")
        loop = asyncio.get_running_loop()
        turns = [(turn.role, turn.parts) for turn in request.turns]
        caller = request.caller
        async with (
            self._decoder.decoded(request.images, caller) as pictures,
            self._turns.turn(caller, rest=self._rest(caller)),
        ):
            encode = partial(self._encode, turns, request.images, request.sampling, pictures)
            prompt = await loop.run_in_executor(self._encoders, encode)
        name = resident.name if resident is not None else BASE
        adapter = None if self._pool is None else name
        sampling = request.sampling
        if resident is not None and resident.beta > 0:
            sampling = replace(sampling, value_beta=resident.beta)
        on_start = partial(self._waiting.pop, mark, None)
        return Ticket(prompt, request.n, sampling, adapter, streams, loop, request.caller, on_start)

    def _rest(self, caller: str | None) -> float:
        if self._prompts.processes:  # they have an interpreter each
            return 0.0
        now = time.monotonic()
        self._left = {other: left for other, left in self._left.items() if now - left < _ABOUT_S}
        return _REST if any(other != caller for other in (*self._present.values(), *self._left)) else 0.0

    def _encode(
        self,
        turns: Sequence[tuple[str, Sequence[str | int]]],
        images: Sequence[bytes],
        sampling: SamplingParams,
        pictures: Sequence[SharedPicture],
    ) -> EncodedPrompt:
        check_sampling(sampling)
        prompt = self._prompts.conversation(turns, images, pictures)
        check_context(self._policy, prompt, sampling.max_new_tokens)
        return prompt if self._vllm is None else self._with_source(prompt, turns, images_of(pictures))

    def _with_source(
        self, prompt: EncodedPrompt, turns: Sequence[tuple[str, Sequence[str | int]]], pictures: Sequence[Image.Image]
    ) -> EncodedPrompt:
        """As the decoder takes it: vLLM makes pixels itself, and is given the pictures."""
        if self._vllm is None:
            return prompt
        return replace(prompt, model_inputs={}, source=conversation_source(self._policy, turns, pictures))

    def _served(self, request: GenerateRequest, resident: Resident | None, prompt: EncodedPrompt) -> Served:
        version = resident.version.step if resident is not None else 0
        return Served(request.model, version, prompt.input_ids.numel())

    def _let_go(self, ticket: Ticket | None, resident: Resident | None) -> None:
        """Frees the rows, if any, and then the adapter."""
        if ticket is not None and not ticket.ended:
            self._thread.cancel(ticket)
        if resident is not None and self._leases is not None:
            self._leases.give_back(resident)

    def _too_slow(self) -> ServingError:
        return ServingError(f"the request did not finish within {self._timeout_s:g} s; ask for fewer tokens, or later")

    # -- the decode thread -----------------------------------------------------------------------------------------

    def _make_decoder(self) -> GroupBook:
        if self._vllm is not None:
            return self._vllm.decoder(max_rows=self._max_rows, adapters=self._pool is not None)
        rows = self._pool.rows if self._pool is not None else None
        return Decoder(
            self._policy, vision_cache=self._cache, max_rows=self._max_rows, adapters=rows, rules=self._rules
        )

    def _warm_up(self, prompt: EncodedPrompt) -> None:
        """Finds out how this model takes vision features, and lets every buffer and kernel be made."""
        if self._vllm is not None:
            self._vllm.try_prompt(prompt, _GREEDY)
            return
        choice = choose_path(self._policy, [prompt])
        logger.info("the model's own forward and the decode loop's: %s", choice.reason)
        decoder = Decoder(self._policy, max_rows=self._max_rows)
        decode_groups(decoder, [DecodeRequest(prompt, 1, _GREEDY)])


_GREEDY = SamplingParams(greedy=True, max_new_tokens=_WARM_UP_TOKENS)


def _picture() -> bytes:
    return encode_png(Image.linear_gradient("L").resize((_WARM_UP_SIDE, _WARM_UP_SIDE)).convert("RGB"))


@contextmanager
def _own_errors() -> Iterator[None]:
    """Turns whatever the model raised into what a `PolicyService` may raise."""
    try:
        yield
    except _OWN_ERRORS:
        raise
    except ProcessError as error:
        logger.warning("a request failed: %s", error)
        raise OverloadedError("the model's process was lost, another one takes its place: try again later") from error
    except Exception as error:
        logger.warning("a request failed", exc_info=error)
        name = type(error).__name__
        raise ServingError(f"the model failed on this request ({name}); the server's log says more") from error


def export_engine_metrics(meter: Meter, stats: Callable[[], Mapping[str, float]]) -> None:
    """Has `meter` look at `Engine.stats`."""
    totals = Totals(meter)

    def look() -> None:
        found = stats()
        for name, metric in _COUNTERS.items():
            totals.reach(metric, found[name])
        totals.reach(table.POLICY_VISION, found["vision_cache_hits"], result="hit")
        totals.reach(table.POLICY_VISION, found["images_encoded"], result="miss")
        meter.set(table.POLICY_UNDER_WAY, found["waiting_requests"], state="waiting")
        meter.set(table.POLICY_UNDER_WAY, found["running_requests"], state="running")
        meter.set(table.POLICY_ROWS, found["running_rows"])
        meter.set(table.POLICY_CACHE, found["vision_cache_bytes"])

    meter.watch(look)
