"""The agent of a value-based run as a `PolicyService`: greedy words, or words drawn by exp(Q / temperature).

    request ──encode (thread)──▶ vision tower ──▶ the agent's words ──▶ choices, deltas

A caption is a few words of a small network: one thread does all of it, request after request, by turns of
their callers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from mmrl_ray.algorithms.dqn.agent import AGENT_FOLDER, Agent, Saying
from mmrl_ray.algorithms.dqn.network import prompt_features
from mmrl_ray.data.decoder_pool import SharedPicture, images_of
from mmrl_ray.errors import ConfigError, MMRLError, OverloadedError, ServingError, UnknownModelError
from mmrl_ray.policy.generation.sampling import check_sampling
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_conversation
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.run_records.checkpoint_choice import choose_checkpoint
from mmrl_ray.run_records.run_dir import MANIFEST, RunDir
from mmrl_ray.serving.images import RequestDecoder, Turns
from mmrl_ray.serving.protocols import Choice, Delta, Generated, GenerateRequest, ModelInfo, Served, TokenInfo


class AgentEngine:
    """`PolicyService` in this process, with the other engine's ways to start, end and be looked after."""

    def __init__(
        self,
        policy: Policy,
        run: RunDir,
        *,
        model_id: str,
        vision_cache_bytes: int,
        max_rows: int,
        max_queue: int,
        timeout_s: float,
        threads: int = 1,
    ) -> None:
        """Reads the run's agent, the final one or that of its newest checkpoint; nothing runs before `start`.

        Args as those of `Engine`, but `max_rows` bounds the completions of one request; of `policy` it uses the vision
        tower.

        Raises:
            RunError: the run has no agent yet.
            ModelError: it cannot be read.
        """
        policy.model.requires_grad_(False)
        self._policy, self._model_id = policy, model_id
        self._max_rows, self._max_queue, self._timeout_s = max_rows, max_queue, timeout_s
        self._agent, self._version, self._created = _newest_agent(run)
        self._cache = VisionCache(vision_cache_bytes)
        self._worker = ThreadPoolExecutor(1, "agent", torch.set_num_threads, (threads,))
        self._decoder = RequestDecoder()
        self._turns = Turns(1)
        self._under_way = self._requests = self._failed = self._tokens = 0
        self._warm = False

    def start(self) -> None:
        """Begins to take requests."""
        self._warm = True

    def close(self) -> None:
        """Takes no more; what waits gets an error."""
        self._warm = False
        self._worker.shutdown(cancel_futures=True)

    @property
    def healthy(self) -> bool:
        """It has no state that could break."""
        return True

    async def ready(self) -> bool:
        """Whether it has been started and not been closed."""
        return self._warm

    async def refresh(self) -> None:
        """An agent is served as it was when the server started."""

    async def models(self) -> list[ModelInfo]:
        """The one agent: it has no adapters."""
        return [ModelInfo(self._model_id, self._created, root=self._model_id, parent=None, version=self._version)]

    async def generate(self, request: GenerateRequest) -> Generated:
        """All choices, finished."""
        with self._counted():
            served, said = await self._answer(request)
            return Generated(served, tuple(self._choice(i, each) for i, each in enumerate(said)))

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Served | Delta]:
        """`Served`, then a delta a word; all of them are there by the time the first one is sent."""
        with self._counted():
            served, said = await self._answer(request)
            yield served
            for i, each in enumerate(said):
                choice = self._choice(i, each)
                for place, token in enumerate(choice.tokens):
                    is_last = place == len(choice.tokens) - 1
                    yield Delta(i, token.text, (token,), choice.finish_reason if is_last else None)

    def stats(self) -> dict[str, float]:
        """Numbers for metrics, as `Engine.stats`."""
        return {
            "waiting_requests": max(0, self._under_way - 1),
            "running_requests": min(1, self._under_way),
            "running_rows": min(1, self._under_way),
            "requests": self._requests,
            "failed_requests": self._failed,
            "tokens": self._tokens,
            "images_encoded": self._cache.misses,
            "vision_cache_hits": self._cache.hits,
            "vision_cache_bytes": self._cache.nbytes,
        }

    async def _answer(self, request: GenerateRequest) -> tuple[Served, list[Saying]]:
        self._check(request)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                async with (
                    self._decoder.decoded(request.images, request.caller) as pictures,
                    self._turns.turn(request.caller),
                ):
                    return await loop.run_in_executor(self._worker, self._work, request, pictures)
        except TimeoutError as error:
            raise ServingError(f"the request did not finish within {self._timeout_s:g} s; try again later") from error

    def _check(self, request: GenerateRequest) -> None:
        sampling = request.sampling
        if request.model != self._model_id:
            raise UnknownModelError(f"no model {request.model[:64]!r} is served here; there is {self._model_id!r}")
        if not 1 <= request.n <= self._max_rows:
            raise ConfigError(f"n={request.n} completions: from 1 to {self._max_rows} can be asked for")
        check_sampling(sampling)
        if sampling.top_k or sampling.top_p != 1 or sampling.stop or sampling.min_new_tokens:
            raise ConfigError(
                "a value-based agent draws from all of its words and ends where it likes: leave top_k, top_p, stop and "
                "min_new_tokens out"
            )

    def _work(self, request: GenerateRequest, pictures: Sequence[SharedPicture]) -> tuple[Served, list[Saying]]:
        turns = [(turn.role, turn.parts) for turn in request.turns]
        prompt = encode_conversation(self._policy, turns, request.images, images_of(pictures))
        tokens = self._agent.facts.shape.image_tokens
        (image,) = prompt_features(self._policy, [prompt], tokens, self._cache)
        sampling = request.sampling
        said = self._agent.say(
            image,
            request.n,
            temperature=sampling.temperature,
            greedy=sampling.greedy,
            seed=sampling.seed,
            most=sampling.max_new_tokens,
        )
        self._tokens += sum(len(each.actions) for each in said)
        return Served(request.model, self._version, prompt.input_ids.numel()), said

    def _choice(self, index: int, said: Saying) -> Choice:
        vocabulary = self._agent.facts.vocabulary
        tokens = []
        for place, (action, logprob) in enumerate(zip(said.actions, said.logprobs, strict=True)):
            word = "" if action == vocabulary.end else vocabulary.words[action]
            tokens.append(TokenInfo(f" {word}" if place and word else word, action, logprob))
        text = vocabulary.text(said.words(vocabulary))
        return Choice(index, text, "stop" if said.ended else "length", tuple(tokens))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if not self._warm:
            raise OverloadedError("the agent is not ready yet; try again later")
        if self._under_way > self._max_queue:
            raise OverloadedError(f"{self._under_way} requests are waiting already; try again later")
        self._requests += 1
        self._under_way += 1
        try:
            yield
        except MMRLError:
            self._failed += 1
            raise
        finally:
            self._under_way -= 1


def _newest_agent(run: RunDir) -> tuple[Agent, int, int]:
    """The agent, its step, and when it was made, in Unix seconds."""
    name = choose_checkpoint(run, final=AGENT_FOLDER, holds=MANIFEST).folder
    manifest = run.verify_manifest(name)
    info = run.filesystem.get_file_info(run.full_path(f"{name}/{MANIFEST}"))
    with run.local_copy(name) as folder:
        agent = Agent.load(folder)
    created = 0 if info.mtime_ns is None else math.floor(info.mtime_ns / 1e9)
    return agent, int(manifest["step"]), created
