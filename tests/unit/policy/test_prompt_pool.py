"""Prompts of processes: those of this process to the last bit, and a picture that costs its process costs itself."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest
import torch

from mmrl_ray import processes
from mmrl_ray.data.decoder_pool import DecoderPool
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ImageError, MMRLError
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy import prompt_pool
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompt_pool import PromptPool
from mmrl_ray.policy.prompts import encode_conversation, encode_prompts, without_pixels
from tests.support.tiny_models import image_bytes, load_family, make_samples

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Policy]:
    return lambda family: load_family(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def policy(load: Callable[[str], Policy]) -> Policy:
    return load("qwen2_5_vl")


@contextmanager
def started(policy: Policy) -> Iterator[PromptPool]:
    pool = PromptPool(policy, 1)
    pool.wait()
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(scope="module")
def pool(policy: Policy) -> Iterator[PromptPool]:
    with started(policy) as pool:
        yield pool


def workers() -> set[int]:
    """Processes of this one's children that make prompts, without those that watch them."""
    children, ours = psutil.Process().children(recursive=True), prompt_pool.__name__
    return {each.pid for each in children if not each.children() and ours in str(each.cmdline())}


def same(one: EncodedPrompt, other: EncodedPrompt) -> bool:
    pairs = [(one.input_ids, other.input_ids)]
    pairs += [(one.model_inputs[name], other.model_inputs[name]) for name in other.model_inputs]
    return (
        list(one.model_inputs) == list(other.model_inputs)
        and one.image_key == other.image_key
        and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    )


def wrong(make: Callable[[], object]) -> tuple[type[MMRLError], str]:
    with pytest.raises(MMRLError) as raised:
        make()
    return raised.type, str(raised.value)


@contextmanager
def stopped_at_work(pool: PromptPool, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> Iterator[Future[object]]:
    """While its process does not get on with what it was asked: this sample."""
    (pid,) = workers()
    asked, send = threading.Event(), processes.send

    def note(to: object, content: bytes) -> None:
        send(to, content)  # type: ignore[arg-type]
        if content == sample.images[0]:
            asked.set()

    monkeypatch.setattr(processes, "send", note)
    os.kill(pid, signal.SIGSTOP)
    found: Future[object] = Future()

    def encode() -> None:
        try:
            found.set_result(pool.encode(sample))
        except MMRLError as error:
            found.set_exception(error)

    thread = threading.Thread(target=encode)
    thread.start()
    assert asked.wait(DEADLINE_S)
    yield found
    thread.join(DEADLINE_S)
    monkeypatch.undo()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_prompts_are_those_of_this_process(
    family: str, policy: Policy, pool: PromptPool, load: Callable[[str], Policy]
) -> None:
    samples = make_samples()
    if family != "qwen2_5_vl":
        policy = load(family)
        with started(policy) as another:
            made = [another.encode(sample) for sample in samples]
    else:
        pool.prepare(samples)
        made = [pool.encode(sample) for sample in (*samples[1:], samples[0])]
        made = [made[-1], *made[:-1]]
    expected = encode_prompts(policy, samples)
    assert all(map(same, made, expected))
    pixels = sum(tensor.nbytes for name, tensor in made[0].model_inputs.items() if name.startswith("pixel"))
    assert len(pickle.dumps(without_pixels(made[0]))) < pixels / 4, "what goes on keeps no pixels"


def test_conversations_and_their_pictures(policy: Policy, pool: PromptPool) -> None:
    files = (image_bytes(64, 64, seed=1), image_bytes(96, 64, seed=2), image_bytes(64, 64, seed=1))
    turns = [("system", ["be short ."]), ("user", [1, "describe the image .", 0, 2])]
    decoders = DecoderPool(1)
    shared = {file: decoders.decode_shared(file) for file in set(files)}
    decoders.close()
    made = pool.conversation(turns, files, [shared[file] for file in files])
    assert same(made, encode_conversation(policy, turns, files))
    for bad in ([("user", [0, 1, 2, "<|image_pad|>"])], [("user", [0, "a"])], [("user", [0, 1, 2, "\ud800"])]):
        told = wrong(lambda bad=bad: pool.conversation(bad, files, [shared[file] for file in files]))
        assert told == wrong(lambda bad=bad: encode_conversation(policy, bad, files))


def test_what_is_wrong_with_a_sample_is_told_as_ever(policy: Policy, pool: PromptPool) -> None:
    good = make_samples()[0]
    bad = [
        replace(good, images=(good.images[0][:300],)),
        replace(good, images=(b"{}",)),
        replace(good, images=()),
        replace(good, prompt="say <|image_pad|> ."),
    ]
    pool.prepare([*bad, good])
    for sample in bad:
        told = wrong(lambda sample=sample: pool.encode(sample))
        assert told == wrong(lambda sample=sample: encode_prompts(policy, [sample]))
    assert same(pool.encode(good), *encode_prompts(policy, [good]))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_prompts_that_are_kept_keep_no_files_open(pool: PromptPool) -> None:
    samples = make_samples([(32, 32)] * 20)
    pool.encode(samples[0])
    before = len(os.listdir("/proc/self/fd"))
    kept = [pool.encode(sample) for sample in samples]
    assert len(kept) == 20
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_picture_that_ends_its_process_is_refused_alone(
    policy: Policy, pool: PromptPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a crash at once; by a death from outside only if that comes again; by no answer at its deadline."""
    sample, other = make_samples(seed=5)[:2]
    (first,) = workers()
    with stopped_at_work(pool, sample, monkeypatch) as found:
        os.kill(first, signal.SIGSEGV)
        os.kill(first, signal.SIGCONT)
        with pytest.raises(ImageError, match="crashed over it"):
            found.result(DEADLINE_S)
    assert same(pool.encode(other), *encode_prompts(policy, [other]))
    with stopped_at_work(pool, sample, monkeypatch) as found:
        for pid in workers():
            os.kill(pid, signal.SIGKILL)
        assert same(found.result(DEADLINE_S), *encode_prompts(policy, [sample]))  # type: ignore[arg-type]
    monkeypatch.setattr(prompt_pool, "_ANSWER_S", 0.5)
    with (
        stopped_at_work(pool, sample, monkeypatch) as found,
        pytest.raises(ImageError, match=r"sample 'sample-0': .* no answer within 0\.5 s"),
    ):
        found.result(DEADLINE_S)
    assert not workers(), "it is ended"


def test_without_processes_prompts_are_made_here(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    samples = make_samples()
    with started(policy) as pool:
        pool.prepare(samples)
        assert all(map(same, map(pool.encode, samples), encode_prompts(policy, samples)))
