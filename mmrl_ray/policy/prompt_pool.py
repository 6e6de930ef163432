"""Prompts made in processes of their own: pictures decoded, resized and cut into patches beside the model.

    sample ──encoded pictures──▶ process: decode, processor ──pixels in shared memory──▶ `EncodedPrompt`

A 1,024 × 1,024 picture takes 40 to 50 ms of CPU time in Qwen2.5-VL's processor, one after the other before an
assignment is decoded. A process has the processor of the policy, loaded once (4 s of CPU time, about 300 MB, and 80
more a megapixel at work), one thread, no GPU, and makes what `encode_prompts` and `encode_conversation` make, to the
last bit. Its tensors come back in memory that both processes map, the pixels without a copy: 4 ms of CPU time a picture
are left to the process that has the model.

A picture that its process crashes over, or does not finish, is refused as a broken one; one whose process is ended from
outside is tried once more. Where no process can be started, prompts are made here, as with 0 of them.
"""

from __future__ import annotations

import json
import logging
import resource
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

import mmrl_ray.errors
from mmrl_ray.child import Shared, receive, receive_shared, send
from mmrl_ray.data.decoder_pool import SharedPicture, budget_of, images_of, lost_over, within
from mmrl_ray.data.images import decode_image
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ImageError, MMRLError, OverloadedError, ProcessError
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.prompts import Turns, encode_conversation, encode_prompts
from mmrl_ray.processes import ChildProcess, Lost, ProcessPool

if TYPE_CHECKING:
    from mmrl_ray.policy.model import Policy

logger = logging.getLogger(__name__)

_START_S = 120.0
"""For a process to import torch and transformers and to load the processor."""
_ANSWER_S = 60.0
"""For one prompt, a thousand times what it takes."""
_ALIGNED = 64
"""Bytes: where tensors begin."""
_FACTS = ("image_token_ids", "appended_ids", "reserved_texts", "processor_settings", "revision_key", "path", "revision")
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_Key = tuple[str, str, tuple[bytes, ...]]


class _NotStarted(ProcessError):
    """No process can be had."""


class _Hung(ProcessError):
    """A process was ended at its deadline."""


class PromptPool:
    """Makes a policy's prompts. For one thread, but for `conversation`, which is for any."""

    def __init__(self, policy: Policy, processes: int = 0) -> None:
        """Starts so many processes, and does not wait for them; with 0 everything is done in the caller's thread."""
        self.processes = processes
        self.ahead = 0
        """Prompts of samples that were there already when they were asked for."""
        self._policy = policy
        self._prepared: dict[_Key, Future[EncodedPrompt]] = {}
        if not processes:
            return
        self._pool = ProcessPool(f"{__name__}:work", "a prompt", processes, environment=_ENVIRONMENT, begin=self._begin)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="prompts")
        self._starting = [self._threads.submit(self._start) for _ in range(processes)]

    def wait(self) -> None:
        """Until the processes are there, or cannot be had."""
        if self.processes:
            wait(self._starting, _START_S)

    def prepare(self, samples: Sequence[Sample]) -> None:
        """From now on prompts of these are made, in this order; others that are not asked for yet are forgotten."""
        if not self.processes:
            return
        before, self._prepared = self._prepared, {}
        for sample in samples:
            if (key := _key(sample)) not in self._prepared:
                known = before.pop(key, None)
                self._prepared[key] = self._threads.submit(self._of_sample, sample) if known is None else known
        for forgotten in before.values():
            forgotten.cancel()

    def encode(self, sample: Sample) -> EncodedPrompt:
        """The prompt of a sample, prepared or not; raises like `encode_prompts`."""
        if not self.processes:
            (prompt,) = encode_prompts(self._policy, [sample])
            return prompt
        made = self._prepared.pop(_key(sample), None)
        if made is None:
            made = self._threads.submit(self._of_sample, sample)
        self.ahead += made.done()
        return made.result()  # each of those before it has its deadlines

    def conversation(self, turns: Turns, images: Sequence[bytes], pictures: Sequence[SharedPicture]) -> EncodedPrompt:
        """The prompt of a conversation whose pictures are decoded; raises like `encode_conversation`.

        Raises:
            OverloadedError: its process was ended from outside twice, or gave no answer.
        """
        if not self.processes:
            return encode_conversation(self._policy, turns, images, images_of(pictures))
        distinct = list(dict.fromkeys(pictures))
        asked = {
            "turns": [[role, list(parts)] for role, parts in turns],
            "sizes": [each.size for each in distinct],
            "places": [distinct.index(each) for each in pictures],
        }
        try:
            return self._tried(asked, images, [each.pixels for each in distinct])
        except _NotStarted as error:
            logger.warning("a conversation is encoded in the server's own process: %s", error)
            return encode_conversation(self._policy, turns, images, images_of(pictures))
        except ProcessError as error:
            raise OverloadedError(f"a prompt could not be made now ({error}): try again later") from error

    def close(self) -> None:
        """Ends the processes, after the prompts that they are at."""
        if self.processes:
            self._threads.shutdown(cancel_futures=True)
            self._pool.close()

    def _of_sample(self, sample: Sample) -> EncodedPrompt:
        try:
            return self._tried({"id": sample.id, "prompt": sample.prompt}, sample.images, ())
        except _NotStarted as error:
            logger.warning("sample %r is encoded in the worker's own process: %s", sample.id, error)
            (prompt,) = encode_prompts(self._policy, [sample])
            return prompt
        except ProcessError as error:
            raise ImageError(f"sample {sample.id!r}: {error}") from error

    def _tried(self, asked: Mapping[str, Any], images: Sequence[bytes], pixels: Sequence[Shared]) -> EncodedPrompt:
        """Once more where the process was ended from outside: it may have been for want of memory."""
        try:
            return self._ask(asked, images, pixels)
        except (_NotStarted, _Hung):
            raise
        except ProcessError:
            return self._ask(asked, images, pixels)

    def _ask(self, asked: Mapping[str, Any], images: Sequence[bytes], pixels: Sequence[Shared]) -> EncodedPrompt:
        head = json.dumps({**asked, "images": len(images)}).encode()
        with ExitStack() as stack:
            try:
                process = stack.enter_context(self._pool.process(_START_S + _ANSWER_S))
            except ProcessError as error:
                raise _NotStarted(str(error)) from error
            answer = process.ask(head, *images, *pixels, timeout_s=_ANSWER_S)
            if isinstance(answer, Lost):
                raise _Hung(answer.reason) if answer.hung else lost_over(answer, _longest(images))
            told: dict[str, Any] = json.loads(answer)
            if "error" in told:
                kind: type[Exception] = getattr(mmrl_ray.errors, told["error"], RuntimeError)
                raise kind(told["message"])
            tensors = process.more(_ANSWER_S)
            if isinstance(tensors, Lost):
                raise ProcessError(tensors.reason)
        return _unpacked(told["key"], told["tensors"], tensors)

    def _start(self) -> None:
        try:
            with self._pool.process(_START_S):
                pass
        except ProcessError as error:
            logger.warning("prompts are made in this process: %s", error)

    def _begin(self, process: ChildProcess) -> None:
        facts = {name: getattr(self._policy, name) for name in _FACTS}
        setup = {**facts, "chat_template": self._policy.processor.chat_template}
        answer = process.ask(json.dumps(setup).encode(), timeout_s=_START_S)
        if isinstance(answer, Lost):
            raise _NotStarted(answer.reason)
        if told := json.loads(answer):
            raise _NotStarted(f"the process of a prompt could not load the processor: {told['message']}")


def _key(sample: Sample) -> _Key:
    return sample.id, sample.prompt, sample.images


def _longest(images: Sequence[bytes]) -> float:
    """Seconds of CPU time that decoding one of these may take, at most."""
    return max((budget_of(image)[0] for image in images), default=0.0)


# -- tensors as bytes --------------------------------------------------------------------------------------------------


def _packed(tensors: Mapping[str, torch.Tensor]) -> tuple[list[Any], Shared]:
    """What `_unpacked` takes."""
    described = [[name, str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()]

    def parts() -> Iterator[bytes | memoryview]:
        for value in tensors.values():
            flat = value.contiguous().reshape(-1).view(torch.uint8)
            yield flat.numpy().data
            yield bytes(-flat.numel() % _ALIGNED)

    return described, Shared.of(parts())


def _unpacked(key: str, described: Sequence[Any], shared: Shared) -> EncodedPrompt:
    """Pixels stay where they are; what goes on without them (`without_pixels`) must not keep them."""
    # Not `shared.map()`, which would keep a file open for each prompt that is kept.
    place = f"/dev/fd/{shared.descriptor}"
    memory = torch.from_file(place, shared=False, size=shared.count, dtype=torch.uint8)
    start, found = 0, {}
    for name, dtype, shape in described:
        kind = getattr(torch, dtype)
        count = prod(shape) * kind.itemsize
        value = memory[start : start + count].view(kind).view(shape)
        found[name] = value if name.startswith("pixel") else value.clone()
        start += -(-count // _ALIGNED) * _ALIGNED
    return EncodedPrompt(input_ids=found.pop("input_ids"), model_inputs=found, image_key=key)


# -- in the process ----------------------------------------------------------------------------------------------------


@dataclass
class _Prompting:
    """`policy.prompts.Prompting`, of a processor without its model."""

    processor: Any
    tokenizer: Any
    processor_settings: dict[str, Any]
    image_token_ids: tuple[int, ...]
    appended_ids: tuple[int, ...]
    reserved_texts: tuple[str, ...]
    revision_key: str
    path: str


def work(owner: socket.socket) -> None:
    """Loads the processor that the first frame names, then answers until the owner is gone.

    A request is JSON, a sample's or a conversation's, its encoded pictures, and a conversation's pixels (`Shared`). An
    answer is JSON, an error or the description of a prompt's tensors, then those.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    if (setup := receive(owner)) is None:
        return
    try:
        prompting = _loaded(json.loads(setup))
    except Exception as error:  # noqa: BLE001 - the owner is told, and does without
        send(owner, json.dumps({"message": f"{type(error).__name__}: {error}"}).encode())
        return
    send(owner, b"{}")
    while (head := receive(owner)) is not None:
        asked: dict[str, Any] = json.loads(head)
        images = tuple(bytes(receive(owner) or b"") for _ in range(asked["images"]))
        shared = [receive_shared(owner) for _ in asked.get("sizes", ())]
        try:
            prompt = _made(prompting, asked, images, [each for each in shared if each is not None])
            described, tensors = _packed({"input_ids": prompt.input_ids, **prompt.model_inputs})
        except MMRLError as error:
            send(owner, json.dumps({"error": type(error).__name__, "message": str(error)}).encode())
            continue
        except Exception as error:
            logger.exception("a prompt could not be made")
            message = f"{type(error).__name__}: {error}"
            send(owner, json.dumps({"error": "", "message": message}).encode())
            continue
        send(owner, json.dumps({"key": prompt.image_key, "tensors": described}).encode())
        send(owner, tensors)
        del prompt, tensors, shared  # not while the next one is awaited


def _loaded(setup: dict[str, Any]) -> _Prompting:
    from transformers import AutoConfig

    from mmrl_ray.policy.tokens import load_processor

    path, revision, template = setup["path"], setup.pop("revision"), setup.pop("chat_template")
    config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    processor = load_processor(path, config, revision=revision)
    processor.chat_template = template
    facts: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in setup.items()}
    return _Prompting(processor, processor.tokenizer, **facts)


def _made(
    prompting: _Prompting, asked: Mapping[str, Any], images: tuple[bytes, ...], pixels: Sequence[Shared]
) -> EncodedPrompt:
    if "turns" not in asked:
        (prompt,) = encode_prompts(prompting, [Sample(asked["id"], images, asked["prompt"])], decode=_decode)
        return prompt
    shared = [
        SharedPicture((width, height), each) for (width, height), each in zip(asked["sizes"], pixels, strict=True)
    ]
    pictures = images_of([shared[place] for place in asked["places"]])
    return encode_conversation(prompting, [(role, parts) for role, parts in asked["turns"]], images, pictures)


def _decode(data: bytes) -> Image.Image:
    with within(*budget_of(data)):
        return decode_image(data)
