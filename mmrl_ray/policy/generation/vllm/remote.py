"""The engine on a vLLM server that somebody else runs (`server.py`): its policy is the server's model and an adapter.

    version ──▶ PATH/RUN-vVERSION-HASH/, a PEFT folder that the server sees too ──load──▶ a model of that name there
    prompts: token ids, one placeholder a picture, and the pictures ──▶ token ids and log-probs

Pictures are decoded here, by the one decoder of this project, and travel as PNG; the server's processor makes pixels of
them. The prompt's token ids come back as it computed with them, and are compared with this project's.

A version's name is its own (`shared_adapters.py`). It salts the prefix cache, and each answer says whose it is. A
server that was restarted knows no adapters, and is given the one that is asked for again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmrl_ray.config.engine import EngineSection
from mmrl_ray.data.images import decode_image
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, ContextLengthError, MMRLError, ModelError, ProcessError
from mmrl_ray.experience.carriers import Completion, EncodedPrompt
from mmrl_ray.policy.generation.base import Capabilities, DecodeRequest, GenerationEngine, GroupOutput
from mmrl_ray.policy.generation.vllm.child import FORBIDDEN_BIAS
from mmrl_ray.policy.generation.vllm.exchange import completion_of, loadable, parts_of, sampling_of, source_of
from mmrl_ray.policy.generation.vllm.server import VllmServer
from mmrl_ray.policy.generation.vllm.shared_adapters import Adapter, SharedAdapters
from mmrl_ray.policy.lora.adapter import adapter_config, adapter_state, load_adapter_state
from mmrl_ray.policy.memory import padded_rank
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import with_source
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import VisionCache, give_back

logger = logging.getLogger(__name__)

_NO_LOGPROB = -9999.0
"""What the server writes for NaN and minus infinity."""
_TRIAL_EFFECT = 0.1
"""Of a layer's output, by the trial adapter."""
_TRIAL_SLACK = 0.02
"""Of its effect, for its own rounding: a server keeps it in the model's dtype."""


def start_remote(
    policy: Policy,
    cfg: EngineSection,
    cache: VisionCache,
    *,
    run: str,
    versions: int,
    timeout_s: float,
) -> RemoteEngine:
    """The engine of a worker whose policy has its adapter, on a server that has loaded the same model.

    Args:
        policy: the worker's.
        cfg: where the server is.
        cache: of the features that the scorer makes.
        run: the run's name.
        versions: that may be sampled from at a time.
        timeout_s: for the answers to an assignment's groups.

    Raises:
        ConfigError, AdapterError: the server cannot be used for this run; with the flag that it lacks.
        ProcessError: it is not there, or not within `cfg.start_timeout_s`.
    """
    assert cfg.url is not None
    assert cfg.adapters is not None
    server = VllmServer(cfg.url, api_key_env=cfg.api_key_env, timeout_s=timeout_s)
    try:
        server.wait(cfg.start_timeout_s)
        model, room = server.check(cfg.model)
        one, other, *_ = (i for i in range(len(policy.image_token_ids) + 2) if i not in policy.image_token_ids)
        server.check_logprobs(model, (one, other), policy.vocab_size)
        places = server.places()
        if places is not None and places < versions + 1:
            raise ConfigError(
                f"{server.url} computes with {places} adapters at a time: start it with --max-loras {versions + 1} or "
                f"more, for the {versions} that may be sampled from and the next"
            )
        dtype = str(policy.dtype).removeprefix("torch.")
        exact = cfg.dtype in (None, dtype) and cfg.quantization is None
        adapters = SharedAdapters(Path(cfg.adapters), run, adapter_config(policy.model))
        engine = RemoteEngine(policy, server, adapters, cache, model=model, room=room, versions=versions, exact=exact)
        engine.try_adapter()
    except MMRLError:
        server.close()
        raise
    return engine


class RemoteEngine(GenerationEngine):
    """Samples by a vLLM server; see the file's head."""

    name = "openai"
    remedy = (
        " (does the server have the same weights and --dtype, and make pixels as this process does: with "
        """--mm-processor-kwargs '{"use_fast": false}' where there is no torchvision here?)"""
    )

    def __init__(
        self,
        policy: Policy,
        server: VllmServer,
        adapters: SharedAdapters,
        cache: VisionCache,
        *,
        model: str,
        room: int,
        versions: int = 1,
        exact: bool = True,
    ) -> None:
        """Takes the policy's tokenizer and the adapter that it has now, which is "the adapter as it was made".

        Args:
            policy: the worker's; it is told how much room the server has for a prompt and its completion.
            server: what samples; it is closed with this.
            adapters: where versions go.
            cache: the scorer's.
            model: the server's name for the model without adapter.
            room: tokens of a prompt and its completion.
            versions: that may be sampled from at a time.
            exact: the server computes in the policy's dtype, without quantisation.
        """
        self.capabilities = Capabilities(  # type: ignore[misc]  # of this one
            value_guided=False,
            greedy_extra=True,
            vision_features=False,
            exact_logprobs=exact,
            reproducible=False,
            greedy_logprobs=False,
        )
        policy.context_length = min(policy.context_length, room)
        self._policy, self._server, self._adapters, self._cache = policy, server, adapters, cache
        self._model, self._room, self._versions = model, room, versions
        self._as_made = adapter_state(policy.model)
        config: Any = policy.model.peft_config[policy.model.active_adapter]  # type: ignore[index]
        self._rank = padded_rank(config.r)
        self._held: Adapter | None = None
        self._is_loaded = False
        self._weights: str | None = None
        """Of the server's base, by its own count: it takes others while it runs, too."""

    def load(self, version: int, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Has the server load the version, then lets go of the one before."""
        before, self._held, self._is_loaded = self._held, None, False
        try:
            adapter = loadable(version, weights, self._as_made)
            if adapter is not None:
                self._held = self._adapters.hold(version, adapter)
                self._server.load(self._held.name, str(self._held.path), rank=self._rank)
        finally:
            if before is not None:
                self._adapters.leave(before)
        self._is_loaded = True
        self._delete(self._adapters.before(version - self._versions))

    def prepared(self, prompt: EncodedPrompt, sample: Sample) -> EncodedPrompt:
        """With its pictures, and its tokens before the processor took them."""
        return with_source(self._policy, prompt, sample)

    def give_back(self) -> None:
        """Features that the scorer made; what the server has is on devices of its own."""
        give_back(self._policy.device, self._cache)

    def close(self) -> None:
        """Lets go of the version, which goes if nobody else holds it, and of the server."""
        held, self._held, self._is_loaded = self._held, None, False
        try:
            if held is not None:
                self._adapters.leave(held)
                self._delete([held.name])
        finally:
            self._server.close()

    def try_adapter(self) -> None:
        """Has the server load an adapter, and forget it.

        Raises:
            AdapterError, ConfigError: it cannot; with what it lacks.
        """
        held = self._adapters.hold(0, self._trial())
        try:
            self._server.load(held.name, str(held.path), rank=self._rank)
        finally:
            self._adapters.leave(held)

    def sample_for_comparison(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        """Those of `generate`, once the server has shown that an adapter does there what it does here.

        A layer that it leaves out would show in no comparison of a fresh adapter, which changes nothing.

        Raises:
            ModelError: it does not.
        """
        outputs = self._generate(requests)
        trial, now, held = self._trial(), adapter_state(self._policy.model), self._held
        self._held = self._adapters.hold(0, trial)
        try:
            self._server.load(self._held.name, str(self._held.path), rank=self._rank)
            sampled = self._generate(requests)
            plain = self._scores(requests, sampled)
            load_adapter_state(self._policy.model, trial)
            changed = self._scores(requests, sampled)
        finally:
            load_adapter_state(self._policy.model, now)
            used, self._held = self._held, held
            self._adapters.leave(used)
        self._delete([used.name])
        recorded = torch.cat([c.logprobs for output in sampled for c in output.completions])
        rounding = self._scores(requests, outputs) - torch.cat([c.logprobs for o in outputs for c in o.completions])
        effect, gap = float((changed - plain).abs().mean()), float((recorded - changed).abs().mean())
        if not gap <= _TRIAL_SLACK * effect + 4 * float(rounding.abs().mean()):
            raise ModelError(
                f"{self._server.url} computes an adapter of {len(trial) // 2} layers otherwise than this policy: it "
                f"moves log-probs by {effect:.2g} nats here, and those from there are {gap:.2g} away; is an adapted "
                "layer one that vLLM leaves out (model.lora.targets), or the model another one?"
            )
        return outputs

    def _trial(self) -> dict[str, torch.Tensor]:
        """An adapter that changes every layer, the same in each worker."""
        generator = torch.Generator().manual_seed(0)
        config: Any = self._policy.model.peft_config[self._policy.model.active_adapter]  # type: ignore[index]
        spread = _TRIAL_EFFECT * config.r**0.5 / config.lora_alpha
        return {
            name: spread * torch.randn(tensor.shape, generator=generator) if ".lora_B." in name else tensor
            for name, tensor in self._as_made.items()
            if ".lora_" in name
        }

    def _scores(self, requests: Sequence[DecodeRequest], outputs: Sequence[GroupOutput]) -> torch.Tensor:
        """float32 [all tokens], by the policy as it is."""
        rows = [[c.token_ids for c in output.completions] for output in outputs]
        prompts, temperature = [request.prompt for request in requests], requests[0].sampling.temperature
        with torch.no_grad():
            scores = score_completions(self._policy, prompts, None, rows, temperature, path="naive")
        return scores.logprobs[scores.mask].float().cpu()

    def _delete(self, names: Sequence[str]) -> None:
        with self._adapters.unused(names) as unused:
            for name in unused:
                self._server.unload(name)

    # -- sampling --------------------------------------------------------------------------------------------------

    def _generate(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        if not self._is_loaded:
            raise ProcessError("no version of the policy is loaded on the vLLM server")
        pictures = [_pictures(request) for request in requests]
        asked = [
            (request, self._body(request, n, parts, greedy=greedy))
            for request, parts in zip(requests, pictures, strict=True)
            for n, greedy in parts_of(request)
        ]
        answers = self._server.generate([body for _, body in asked])
        if lost := [place for place, answer in enumerate(answers) if answer is None]:
            # The server was restarted, and knows no adapters; or somebody else has had it forget this one.
            if self._held is not None:
                logger.warning("%s does not know %s any more; it loads it again", self._server.url, self._held.name)
                self._server.load(self._held.name, str(self._held.path), rank=self._rank)
            again = self._server.generate([asked[place][1] for place in lost])
            for place, answer in zip(lost, again, strict=True):
                answers[place] = answer
        sampled = iter([self._completions(*each, answer) for each, answer in zip(asked, answers, strict=True)])
        return [
            GroupOutput(tuple(next(sampled)), next(sampled)[0] if request.greedy_extra else None, None)
            for request in requests
        ]

    def _body(self, request: DecodeRequest, n: int, parts: list[dict[str, Any]], *, greedy: bool) -> dict[str, Any]:
        """One group's. What the server has defaults of its own for is written, too."""
        length, new = request.prompt.input_ids.numel(), request.sampling.max_new_tokens
        if length + new > self._room:
            raise ContextLengthError(
                f"prompt of {length} tokens plus max_new_tokens={new} exceeds the {self._room} that "
                f"{self._server.url} has room for: start it with a larger --max-model-len"
            )
        name = self._model if self._held is None else self._held.name
        sampling = {
            **sampling_of(request.sampling, n, greedy=greedy),
            **{"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
            "logprobs": 0,
            "stop_token_ids": list(self._policy.eos_token_ids),
            "ignore_eos": True,  # it is among those, if it is one of this policy's
            "logit_bias": {str(token): FORBIDDEN_BIAS for token in self._policy.image_token_ids},
            "detokenize": False,
        }
        return {
            "model": name,
            "token_ids": source_of(request.prompt).token_ids.tolist(),
            **({"content_parts": parts} if parts else {}),
            "sampling_params": sampling,
            "return_token_ids": True,
            "cache_salt": hashlib.sha256(name.encode()).hexdigest(),  # a name may be too long for it, or hold a slash
        }

    def _completions(
        self, request: DecodeRequest, body: Mapping[str, Any], answer: Mapping[str, Any] | None
    ) -> list[Completion]:
        url = self._server.url
        if answer is None:
            raise ProcessError(f"{url} does not know {body['model']}, which it has just loaded: is it several servers?")
        try:
            prompt, model = list(answer["prompt_token_ids"]), answer["model"]
            rows = sorted(answer["choices"], key=lambda row: row["index"])
            found = [([int(t) for t in row["token_ids"]], row["logprobs"]["content"], row) for row in rows]
            drawn = [
                (ids, [float(each["logprob"]) for each in places], str(row["finish_reason"]))
                for ids, places, row in found
                if ids == [each["token_id"] for each in places]
            ]
            weights = {span["version"] for row in rows for span in row.get("weight_versions") or ()}
        except (LookupError, TypeError, ValueError) as error:
            raise ProcessError(f"{url} answered in an unknown shape ({error!r})") from error
        if model != body["model"]:
            raise ProcessError(f"{url} answered by {model!r} where {body['model']!r} was asked")
        if self._weights is None and len(weights) == 1:
            (self._weights,) = weights
        if weights - {self._weights}:
            raise ModelError(f"{url} was given other weights than those that it began with: {sorted(weights)}")
        if prompt != (expected := request.prompt.input_ids.tolist()):
            raise ModelError(
                f"{url} makes other tokens of a prompt ({len(prompt)}) than this process ({len(expected)}): it has "
                "another model or processor; what is model.processor here is --mm-processor-kwargs there"
            )
        ended = {finish for _, _, finish in drawn}
        if len(drawn) != body["sampling_params"]["n"] or not ended <= {"stop", "length"}:
            raise ProcessError(
                f"{url} gave {len(drawn)} whole completions of {body['sampling_params']['n']}, ended by {sorted(ended)}"
            )
        if any(not _NO_LOGPROB < value < float("inf") for _, values, _ in drawn for value in values):
            raise ModelError(f"log-probs of {url} hold NaN or infinity; try --dtype float32, or an earlier version")
        return [
            completion_of(self._policy, torch.tensor(ids, dtype=torch.int64), torch.tensor(values), finish)
            for ids, values, finish in drawn
        ]


def _pictures(request: DecodeRequest) -> list[dict[str, Any]]:
    """A prompt's, as the server takes them: without loss, so that it sees what this process sees."""
    parts = []
    for image in source_of(request.prompt).images:
        file = io.BytesIO()
        picture = decode_image(image) if isinstance(image, bytes) else Image.fromarray(image.numpy())
        picture.save(file, "PNG", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "url": url})
    return parts
