"""A vLLM server that somebody else runs, by its HTTP API.

Of its endpoints /inference/v1/generate alone takes exact token ids with pictures beside them, and gives token ids with
their log-probs: /v1/completions takes no pictures, and /v1/chat/completions makes the prompt's tokens itself, of text.
It adds nothing of the server's generation_config, and is there with `--enable-scale-out`.

Whatever may pass is asked again a few times: a connection that cannot be made or breaks, and a server that says it is
busy. Sampling repeats by its seed and changes nothing, so that it may be asked twice.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
from tenacity import AsyncRetrying, retry_if_exception, retry_if_result, stop_after_attempt

from mmrl_ray import __version__
from mmrl_ray.client import lost, may_pass, wait_s
from mmrl_ray.errors import AdapterError, ConfigError, ContextLengthError, ProcessError, one_line
from mmrl_ray.policy.generation.vllm.installed import OLDEST, is_known

GENERATE = "/inference/v1/generate"
_TRIES = 4
_CONNECT_S = 10.0
_MOST_AT_A_TIME = 64
"""Requests under way; further ones wait for one of their connections."""
_LOOK_EVERY_S = 0.5
_LOOK_S = 10.0
"""For one answer that takes no computing."""
_LORAS = re.compile(r'vllm:lora_requests_info\{[^}]*max_lora="(\d+)"')
_WITH_ADAPTERS = "with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
T = TypeVar("T")


class VllmServer:
    """One server; one thread at a time. Every wait has a deadline, and no message holds the key."""

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str | None = None,
        timeout_s: float,
        tries: int = _TRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Connects with the first request.

        Args:
            url: with or without `/v1`.
            api_key_env: the environment variable with its key.
            timeout_s: for the answers to all requests that are made at a time.
            tries: of a request that may pass.
            transport: what sends requests; for tests.

        Raises:
            ConfigError: the variable is not set here, or holds what no key is.
        """
        key = "" if api_key_env is None else os.environ.get(api_key_env, "").strip()
        if api_key_env is not None and not (key and all("!" <= character <= "~" for character in key)):
            raise ConfigError(
                f"rollout.engine.api_key_env={api_key_env}: the environment variable is not set where rollout workers "
                "run, or holds spaces or other characters that no key has"
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s, self._key_env = timeout_s, api_key_env
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"user-agent": f"mmrl_ray/{__version__}"} | ({"authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S)),
            limits=httpx.Limits(max_connections=_MOST_AT_A_TIME),
            transport=transport,
        )
        self._retrying = AsyncRetrying(
            retry=retry_if_result(may_pass) | retry_if_exception(lost),
            stop=stop_after_attempt(tries),
            wait=wait_s,
            retry_error_callback=lambda state: state.outcome.result(),  # type: ignore[union-attr]  # or raises
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of its connections."""
        self._runner.run(self._http.aclose())
        self._runner.close()

    # -- what it is ------------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> None:
        """Until it answers: it may be loading its model.

        Raises:
            ProcessError: it does not by then.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            look_s = max(0.1, min(_LOOK_S, deadline - time.monotonic()))
            try:
                response = self._run(self._http.get("/health", timeout=look_s), look_s)
            except (httpx.TransportError, ProcessError) as error:
                found = one_line(error) or type(error).__name__
            else:
                if response.status_code == 200:
                    return
                found = f"status {response.status_code}"
            if time.monotonic() >= deadline:
                raise ProcessError(
                    f"rollout.engine.url={self.url}: no vLLM server answers there ({found}){_proxied(self.url)}"
                )
            time.sleep(min(_LOOK_EVERY_S, max(0.0, deadline - time.monotonic())))

    def check(self, model: str | None) -> tuple[str, int]:
        """The name of the model that it serves, and the tokens that it has room for.

        Args:
            model: one of its names; by default the first.

        Raises:
            ConfigError: it is no vLLM of a known release, or serves no such model.
            ProcessError: it is gone.
        """
        response = self._ask("GET", "/version")
        try:
            release = str(response.json()["version"])
            known = is_known(release)
        except (LookupError, TypeError, ValueError):
            raise ConfigError(f"rollout.engine.url={self.url} is no vLLM server: it has no /version") from None
        if not known:
            raise ConfigError(f"{self.url} is vLLM {release}; its API is known from {OLDEST[0]}.{OLDEST[1]} on")
        cards = self._json(self._ask("GET", "/v1/models")).get("data", [])
        bases = {card["id"]: card.get("max_model_len") for card in cards if card.get("parent") is None}
        name = next(iter(bases), None) if model is None else model
        if name is None or not bases.get(name):
            raise ConfigError(f"{self.url} serves no model rollout.engine.model={name!r}: it has {sorted(bases)}")
        return name, int(bases[name])

    def check_logprobs(self, model: str, tokens: tuple[int, int] = (0, 1), vocab_size: int | None = None) -> None:
        """Whether it gives the log-probs that it draws with, of a model with this vocabulary.

        Two tokens alone are allowed, at a temperature: the probabilities of just these two make one then.

        Raises:
            ConfigError: it does not; with the flag to start it with.
            ProcessError: it is gone.
        """
        sampling = {"max_tokens": 1, "temperature": 0.5, "logprobs": 2, "detokenize": False}
        asked = {"model": model, "token_ids": [tokens[0]], "return_token_ids": True}
        (answer,) = self.generate([{**asked, "sampling_params": {**sampling, "allowed_token_ids": list(tokens)}}])
        try:
            (place,) = answer["choices"][0]["logprobs"]["content"]  # type: ignore[index]
            found = {each["token_id"]: math.exp(each["logprob"]) for each in place["top_logprobs"]}
            echoed = answer["prompt_token_ids"]  # type: ignore[index]
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.url} gives no token ids with log-probs ({error!r})") from None
        if echoed != asked["token_ids"]:
            raise ConfigError(f"{self.url} does not give back the token ids of a prompt as they were sent")
        if set(found) != set(tokens) or abs(sum(found.values()) - 1) > 1e-3:
            raise ConfigError(
                f"{self.url} gives other log-probs than those that it draws with: start it with "
                "--logprobs-mode processed_logprobs"
            )
        if vocab_size is None:
            return
        for token, is_one in ((vocab_size - 1, True), (vocab_size, False)):
            body = {**asked, "sampling_params": {**sampling, "logit_bias": {str(token): 0.0}}}
            if (self._ask("POST", GENERATE, body).status_code == 200) != is_one:
                raise ConfigError(
                    f"{self.url} serves another model: model.path has a vocabulary of {vocab_size} tokens, and that "
                    f"has {'less' if is_one else 'more'}"
                )

    def places(self) -> int | None:
        """Adapters that it computes with at a time; None where it does not tell. Known once it has sampled."""
        found = _LORAS.search(self._ask("GET", "/metrics").text)
        return None if found is None else int(found[1])

    # -- what it does ----------------------------------------------------------------------------------------------

    def load(self, name: str, path: str, *, rank: int) -> None:
        """Has it read an adapter; one of that name that it has already is the same.

        Raises:
            AdapterError: it cannot read or take it.
            ConfigError: it takes none while it runs.
            ProcessError: it is gone.
        """
        response = self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        said = self._said(response)
        if response.status_code == 200 or (response.status_code == 400 and "already been loaded" in said):
            return
        if self._has_no_path(response) or "not enabled" in said:
            raise ConfigError(f"{self.url} takes no adapters while it runs: start it {_WITH_ADAPTERS}")
        remedy = ""
        if "max_lora_rank" in said or "is greater than" in said:
            remedy = f": start it with --max-lora-rank {rank} or more"
        elif "No adapter found" in said:
            remedy = ": rollout.engine.adapters has to be one folder under one path for it and for the rollout workers"
        raise AdapterError(f"{self.url} did not load the adapter {path}: {said or response.status_code}{remedy}")

    def unload(self, name: str) -> None:
        """Has it forget an adapter, if it has it.

        Raises:
            ProcessError: it is gone.
        """
        response = self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if response.status_code >= 500:
            self._json(response)

    def generate(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
        """The answers to requests of `GENERATE`, all under way at a time; None where it does not know the model.

        Raises:
            ConfigError: it has no such endpoint, wants a key, or refuses a request.
            ContextLengthError: it has no room for a prompt.
            ProcessError: it is gone, has failed, or is not done in time; then what is under way is given up.
        """

        async def one(body: dict[str, Any]) -> dict[str, Any] | None:
            return self._generated(await self._call("POST", GENERATE, body))

        async def all_of_them() -> list[dict[str, Any] | None]:
            tasks = [asyncio.ensure_future(one(body)) for body in bodies]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        return self._run(all_of_them(), self._timeout_s)

    def _generated(self, response: httpx.Response) -> dict[str, Any] | None:
        if self._has_no_path(response):
            raise ConfigError(f"{self.url} has no {GENERATE}: start it with --enable-scale-out")
        said = self._said(response)
        if response.status_code == 404 and "does not exist" in said:
            return None
        if response.status_code == 400 and "maximum" in said and "length" in said:
            raise ContextLengthError(f"{self.url}: {said}; start it with a larger --max-model-len")
        return self._json(response)

    # -- one request -----------------------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """The answer, whatever it is, but for one that wants another key."""
        response = self._run(self._call(method, path, body), self._timeout_s)
        if response.status_code in (401, 403):
            self._json(response)
        return response

    async def _call(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        try:
            return await self._retrying(self._http.request, method, path, json=body)
        except httpx.TimeoutException as error:
            raise ProcessError(
                f"{self.url}: no answer within {self._timeout_s:g} s ({type(error).__name__})"
            ) from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ProcessError(
                f"{self.url}: {one_line(error) or type(error).__name__}; is the vLLM server still running?"
            ) from error

    def _run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        async def in_time() -> T:
            async with asyncio.timeout(timeout_s):
                return await work

        try:
            return self._runner.run(in_time())
        except TimeoutError:
            raise ProcessError(f"{self.url}: no answer within {timeout_s:g} s") from None

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        """The object of a good answer.

        Raises:
            ConfigError: a refusal, which another try would not change.
            ProcessError: the server failed.
        """
        status = response.status_code
        if status in (401, 403):
            key = "it wants a key" if self._key_env is None else f"not with the key that {self._key_env} holds"
            raise ConfigError(f"{self.url} answers {status}: {key}; name its variable in rollout.engine.api_key_env")
        try:
            body = response.json() if status == 200 else None
        except ValueError:
            body = None
        if isinstance(body, dict):
            return body
        said = self._said(response) or "no message"
        if 400 <= status < 500 and status not in (408, 429):
            raise ConfigError(f"{self.url} refuses a request (status {status}): {said}")
        raise ProcessError(f"{self.url} failed (status {status}): {said}")

    @staticmethod
    def _has_no_path(response: httpx.Response) -> bool:
        return response.status_code in (404, 405) and '"error"' not in response.text

    @staticmethod
    def _said(response: httpx.Response) -> str:
        """The message of an error."""
        if response.status_code == 200:
            return ""
        try:
            error = response.json()["error"]
            text = error["message"] if isinstance(error, dict) else error
        except (LookupError, TypeError, ValueError):
            text = response.text
        return " ".join(str(text).split())[:1000]


def _proxied(url: str) -> str:
    """For an error: that a proxy stands between, which may be what answers. It is not named, for it may hold a key."""
    parts = urlsplit(url)
    host = str(parts.hostname)
    if parts.scheme not in getproxies() or proxy_bypass(host):
        return ""
    return f"; it was asked through {parts.scheme}_proxy, and NO_PROXY={host} asks it directly"
