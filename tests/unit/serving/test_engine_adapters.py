"""Adapters in the engine: chosen by id, swapped while requests run, from folders and runs."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from mmrl_ray.config.sections import LoraSection, ModelSection
from mmrl_ray.errors import AdapterError, ConfigError, OverloadedError, UnknownModelError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.learner.checkpoints import LearnerState, save_adapter_folder, save_checkpoint, save_live_version
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.heads import HEADS_FILE, LearningHeads, save_value_heads
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_parameters, add_adapter, save_adapter
from mmrl_ray.policy.lora.pool import AdapterPool
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_conversation
from mmrl_ray.run_records.checkpoint_choice import deliver_best
from mmrl_ray.run_records.run_dir import WEIGHTS_FILE, RunDir, checkpoint_name
from mmrl_ray.serving.adapters import AdapterFolders, RunSource, open_source
from mmrl_ray.serving.engine import Engine
from mmrl_ray.serving.protocols import Generated, GenerateRequest, Turn
from tests.support.tiny_models import build_family, image_bytes
from tests.unit.run_records.test_checkpoint_choice import put

DEADLINE_S = 60.0
PICTURE = image_bytes(64, 64)
GREEDY = SamplingParams(greedy=True, max_new_tokens=12)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family("llava", tmp_path_factory.mktemp("base"))


def load(base: Path) -> Policy:
    return load_policy(ModelSection(path=str(base), dtype="float32"), device="cpu")


@pytest.fixture
def trained(base: Path) -> Callable[[int], Policy]:
    """A policy with an adapter that is felt."""

    def make(seed: int) -> Policy:
        policy = load(base)
        policy.eos_token_ids = (policy.vocab_size - 1,)
        add_adapter(policy, LoraSection(r=4, alpha=12), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(policy.model):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return policy

    return make


def says(policy: Policy) -> list[int]:
    prompt = encode_conversation(policy, [("user", [0, "describe the image ."])], (PICTURE,))
    made = decode_groups(Decoder(policy), [DecodeRequest(prompt, 1, GREEDY)])
    return made[0].completions[0].token_ids.tolist()


@contextmanager
def running(
    base: Path, adapters: Mapping[str, Path | str], folders: tuple[str, ...] = (), **settings: Any
) -> Iterator[Engine]:
    policy = load(base)
    policy.eos_token_ids = (policy.vocab_size - 1,)
    sources = AdapterFolders({id: str(folder) for id, folder in adapters.items()}, folders)
    pool = AdapterPool(policy, sources, max_adapters=settings.pop("max_adapters", 3), max_rank=16)
    values = {"vision_cache_bytes": 1 << 22, "max_rows": 32, "max_queue": 32, "timeout_s": DEADLINE_S, **settings}
    engine = Engine(policy, pool, model_id="tiny", created=5, **values)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


class Starter(Protocol):
    """Starts an engine with adapters; tests/vllm has one of its own."""

    def __call__(
        self, base: Path, adapters: Mapping[str, Path | str], folders: tuple[str, ...] = (), **settings: Any
    ) -> AbstractContextManager[Engine]: ...


@pytest.fixture
def started() -> Starter:
    return running


def ask(model: str, n: int = 1, tokens: int = 12) -> GenerateRequest:
    sampling = SamplingParams(greedy=True, max_new_tokens=tokens)
    return GenerateRequest("r", model, (Turn("user", (0, "describe the image .")),), (PICTURE,), sampling, n)


def tokens_of(made: Generated, choice: int = 0) -> list[int]:
    return [token.token_id for token in made.choices[choice].tokens]


def run(work: Any) -> Any:
    async def within() -> Any:
        return await asyncio.wait_for(work, DEADLINE_S)

    return asyncio.run(within())


def on_model(engine: Engine) -> int:
    """Adapters on the model, or in the process that has it."""
    if engine._vllm is not None:
        return len(engine._vllm.adapters)
    return len(getattr(engine._policy.model, "peft_config", {}))


def save(policy: Policy, folder: Path) -> Path:
    """In one rename each, as a careful operator replaces an adapter."""
    scratch = folder.with_name(f".{folder.name}")
    save_adapter(policy.model, scratch)
    if folder.exists():
        shutil.rmtree(folder)
    scratch.rename(folder)
    return folder


def test_requests_of_several_adapters_run_together(
    base: Path, trained: Callable[[int], Policy], tmp_path: Path, started: Starter
) -> None:
    policies = {"one": trained(1), "two": trained(2)}
    plain = load(base)
    plain.eos_token_ids = policies["one"].eos_token_ids
    expected = {"tiny": says(plain), **{id: says(policy) for id, policy in policies.items()}}
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    folders = {id: save(policy, tmp_path / id) for id, policy in policies.items()}

    async def work(engine: Engine) -> None:
        order = ["one", "tiny", "two", "two", "one", "tiny"] * 3
        for id, made in zip(order, await asyncio.gather(*(engine.generate(ask(id)) for id in order)), strict=True):
            assert tokens_of(made) == expected[id]
            assert made.served.model == id
        with pytest.raises(UnknownModelError, match=r"no model '\.\./one'"):
            await engine.generate(ask("../one"))
        models = await engine.models()
        assert [(m.id, m.root, m.parent) for m in models] == [
            ("tiny", "tiny", None),
            ("one", "tiny", "tiny"),
            ("two", "tiny", "tiny"),
        ]
        assert abs(models[1].created - os.stat(folders["one"] / WEIGHTS_FILE).st_mtime) < 5

    with started(base, folders) as engine:
        run(work(engine))
        assert engine.stats()["decode_prompts"] >= 18


def test_more_adapters_than_fit_take_turns(
    base: Path, trained: Callable[[int], Policy], tmp_path: Path, started: Starter
) -> None:
    policies = {f"a{i}": trained(i) for i in range(1, 4)}
    expected = {id: says(policy) for id, policy in policies.items()}
    for id, policy in policies.items():
        save(policy, tmp_path / id)

    async def work(engine: Engine) -> None:
        for id in ("a3", "a1", "a2", "a3"):
            assert tokens_of(await engine.generate(ask(id))) == expected[id]
        assert on_model(engine) == 1
        stream = engine.stream(ask("a1", tokens=300))
        await anext(stream)
        with pytest.raises(OverloadedError, match="'a2' is not loaded and all 1 that fit are in use"):
            await engine.generate(ask("a2"))
        await stream.aclose()
        assert tokens_of(await engine.generate(ask("a2"))) == expected["a2"]

    with started(base, {}, (str(tmp_path),), max_adapters=1) as engine:
        run(work(engine))


def test_a_swap_fails_no_request_and_mixes_none(
    base: Path, trained: Callable[[int], Policy], tmp_path: Path, started: Starter
) -> None:
    """Clients ask without a pause while a run publishes version after version."""
    trainer = RunDir.create(tmp_path, "run")
    trainer.write_text("config.yaml", "run: {name: run}\n")
    policies = {step: trained(step) for step in range(1, 6)}
    expected = {step: says(policy) for step, policy in policies.items()}
    assert len({tuple(tokens) for tokens in expected.values()}) == 5
    save_live_version(trainer, policies[1], 1)
    seen: list[int] = []

    async def client(engine: Engine, over: asyncio.Event) -> None:
        while not over.is_set():
            made = await engine.generate(ask("run", n=2))
            assert tokens_of(made, 0) == tokens_of(made, 1) == expected[made.served.version]
            seen.append(made.served.version)

    async def work(engine: Engine) -> None:
        over = asyncio.Event()
        clients = [asyncio.create_task(client(engine, over)) for _ in range(4)]
        for step in range(1, 6):
            if step > 1:
                save_live_version(trainer, policies[step], step)
                await engine.refresh()
            async with asyncio.timeout(DEADLINE_S):
                while step not in seen:
                    assert not any(task.done() for task in clients)
                    await asyncio.sleep(0.005)
        over.set()
        await asyncio.gather(*clients)
        assert set(seen) == {1, 2, 3, 4, 5}
        assert (await engine.models())[1].version == 5
        await engine.generate(ask("tiny"))  # behind everything that was given back
        assert on_model(engine) == 1

    with started(base, {"run": trainer.location}) as engine:
        run(work(engine))


def test_a_row_that_runs_keeps_its_version(
    base: Path, trained: Callable[[int], Policy], tmp_path: Path, started: Starter
) -> None:
    first, second = trained(1), trained(2)
    folder = save(first, tmp_path / "one")
    expected = [says(first), says(second)]

    async def work(engine: Engine) -> None:
        stream = engine.stream(ask("one"))
        await anext(stream)
        save(second, folder)
        await engine.refresh()
        assert tokens_of(await engine.generate(ask("one"))) == expected[1]
        assert [token.token_id async for delta in stream for token in delta.tokens] == expected[0]

    with started(base, {"one": folder}) as engine:
        run(work(engine))


def test_a_new_version_that_is_broken_leaves_the_old_one(
    base: Path, trained: Callable[[int], Policy], tmp_path: Path, started: Starter
) -> None:
    folder = save(trained(1), tmp_path / "one")
    expected = says(trained(1))

    async def work(engine: Engine) -> None:
        (folder / WEIGHTS_FILE).write_bytes(b"pickle")
        await engine.refresh()
        await engine.refresh()
        assert tokens_of(await engine.generate(ask("one"))) == expected
        assert len(await engine.models()) == 2

    with started(base, {"one": folder}) as engine:
        run(work(engine))


def test_an_adapter_that_never_worked_is_refused_and_not_listed(base: Path, tmp_path: Path, started: Starter) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{}")
    (tmp_path / "bad" / WEIGHTS_FILE).write_bytes(b"")

    async def work(engine: Engine) -> None:
        assert [model.id for model in await engine.models()] == ["tiny"]
        with pytest.raises(UnknownModelError, match="'bad' of step 0 cannot be used"):
            await engine.generate(ask("bad"))
        assert await engine.ready()

    with started(base, {"bad": tmp_path / "bad"}) as engine:
        run(work(engine))


# -- sources -----------------------------------------------------------------------------------------------------------


def checkpoint(run: RunDir, step: int, policy: Policy) -> None:
    save_checkpoint(run, step, policy=policy, learner=LearnerState({}, {}), controller={}, keep=5)


def step_of(source: RunSource) -> int | None:
    version = source.newest()
    return None if version is None else version.step


def test_a_run_gives_its_newest_version(trained: Callable[[int], Policy], tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path, "run")
    source = RunSource(run_dir)
    assert source.newest() is None
    policies = {step: trained(step) for step in (2, 4, 5)}
    checkpoint(run_dir, 2, policies[2])
    assert step_of(source) == 2
    checkpoint(run_dir, 4, policies[4])
    before = source.newest()
    save_adapter_folder(run_dir, "adapter", policies[4], 4)
    assert source.newest() == before, "the same weights are the same version"
    assert before is not None
    with source.open(before) as folder:
        assert (folder / WEIGHTS_FILE).is_file()
    # A resumed run goes past what it finished with.
    checkpoint(run_dir, 5, policies[5])
    assert step_of(source) == 5


def test_a_checkpoint_is_asked_for_by_its_id(
    base: Path, trained: Callable[[int], Policy], tmp_path: Path, started: Starter
) -> None:
    run_dir = RunDir.create(tmp_path, "mine")
    run_dir.write_text("config.yaml", "{}")
    for step in (2, 4):
        checkpoint(run_dir, step, trained(step))
    with started(base, {"mine": tmp_path / "mine"}, max_adapters=2) as engine:
        newest = run(engine.generate(ask("mine")))
        same = run(engine.generate(ask("mine:ckpt-step-4")))
        older = run(engine.generate(ask("mine:ckpt-step-2")))
        assert [made.served.version for made in (newest, same, older)] == [4, 4, 2]
        assert tokens_of(newest) == tokens_of(same)
        with started(base, {"two": tmp_path / "mine" / "checkpoints" / "step-000002"}) as alone:
            assert tokens_of(older) == tokens_of(run(alone.generate(ask("two"))))
        run(engine.refresh())
        for id in ("mine:ckpt-step-3", "mine:ckpt-step-", "other:ckpt-step-2", "mine:ckpt-step-2:ckpt-step-2"):
            with pytest.raises(UnknownModelError):
                run(engine.generate(ask(id)))


def test_a_damaged_checkpoint_is_passed_over(trained: Callable[[int], Policy], tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path, "run")
    source = RunSource(run_dir)
    for step in (2, 4):
        checkpoint(run_dir, step, trained(step))
    version = source.newest()
    assert version is not None
    weights = Path(run_dir.full_path("checkpoints/step-000004")) / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(Exception, match="does not match its hash"), source.open(version):
        pass
    assert step_of(source) == 2
    (Path(run_dir.full_path("checkpoints/step-000002")) / "manifest.json").write_text("{}")
    assert source.newest() is None
    assert not run_dir.exists("events.jsonl"), "whoever serves a run writes nothing into it"


def test_folders_are_looked_through_for_adapters(trained: Callable[[int], Policy], tmp_path: Path) -> None:
    outside = save(trained(1), tmp_path / "outside")
    runs = tmp_path / "runs"
    runs.mkdir()
    folders = AdapterFolders({"named": str(outside)}, [str(runs), str(tmp_path / "missing")])
    assert set(folders()) == {"named"}
    shutil.copytree(outside, runs / "plain")
    (runs / "link").symlink_to(outside)
    (runs / "..up").mkdir()
    (runs / "notes").mkdir()
    (runs / "run-1").mkdir()
    (runs / "run-1" / "config.yaml").write_text("run: {name: run-1}\n")
    found = folders()
    assert set(found) == {"named", "plain", "run-1"}
    assert isinstance(found["run-1"], RunSource)
    assert folders()["plain"] is found["plain"]


def test_what_is_no_source_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter id '\.\./x'"):
        AdapterFolders({"../x": str(tmp_path)})
    with pytest.raises(AdapterError, match="does not exist"):
        open_source(str(tmp_path / "nothing"))


def with_values(policy: Policy, seed: int, beta: float) -> Policy:
    heads = LearningHeads(policy.hidden_size, policy.vocab_size, 8, beta, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    policy.value_heads[None] = heads
    return policy


def says_by_values(policy: Policy, beta: float) -> list[int]:
    prompt = encode_conversation(policy, [("user", [0, "describe the image ."])], (PICTURE,))
    sampling = replace(GREEDY, value_beta=beta)
    return decode_groups(Decoder(policy), [DecodeRequest(prompt, 1, sampling)])[0].completions[0].token_ids.tolist()


def test_an_adapter_with_value_heads_is_decoded_by_them_beside_others(
    base: Path, trained: Callable[[int], Policy], tmp_path: Path, started: Starter
) -> None:
    """Each by its own heads and β; new heads are a new version, though the adapter's weights are the same."""
    run_dir = RunDir.create(tmp_path, "valued")
    first, second, other, plain = (
        with_values(trained(1), seed, beta) for seed, beta in ((1, 2.0), (2, 3.0), (3, 1.0), (4, 0.0))
    )
    save_adapter_folder(run_dir, "adapter", first, 4)
    folders = {}
    for name, policy in (("other", other), ("plain", plain)):
        folders[name] = tmp_path / name
        save_adapter(policy.model, folders[name])
        save_value_heads(policy.value_heads[None], folders[name], whole=True)
    expected = {
        "valued": says_by_values(first, 2.0),
        "other": says_by_values(other, 1.0),
        "plain": says(trained(1)),
    }
    after = says_by_values(second, 3.0)
    assert len({tuple(tokens) for tokens in (*expected.values(), after)}) == 4

    async def work(engine: Engine) -> None:
        order = ["valued", "plain", "other", "tiny"] * 2
        for id, made in zip(order, await asyncio.gather(*(engine.generate(ask(id)) for id in order)), strict=True):
            assert id == "tiny" or tokens_of(made) == expected[id], id
        run_dir.delete("adapter")
        save_adapter_folder(run_dir, "adapter", second, 4)
        await engine.refresh()
        assert tokens_of(await engine.generate(ask("valued"))) == after
        assert set(engine._policy.value_heads) <= set(engine._policy.model.peft_config)  # type: ignore[arg-type]
        assert len(engine._policy.value_heads) == 3, "what was replaced has gone"

    source = RunSource(run_dir)
    before = source.newest()
    run_dir.write_text("config.yaml", "")
    with started(base, {"valued": tmp_path / "valued", **folders}) as engine:
        run(work(engine))
    assert source.newest() != before


def test_broken_value_heads_refuse_the_adapter(
    base: Path, trained: Callable[[int], Policy], tmp_path: Path, started: Starter
) -> None:
    folder = tmp_path / "one"
    policy = with_values(trained(1), 1, 2.0)
    save_adapter(policy.model, folder)
    save_value_heads(policy.value_heads[None], folder, whole=False)
    (folder / HEADS_FILE).write_bytes(b"nothing")

    async def work(engine: Engine) -> None:
        with pytest.raises(UnknownModelError, match="adapter 'one' of step 0 cannot be used"):
            await engine.generate(ask("one"))

    with started(base, {"one": folder}) as engine:
        run(work(engine))


def test_the_best_stands_for_a_finished_run_until_it_learns_more(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "chosen")
    run.write_text("config.yaml", "")
    for step in (20, 40, 60):
        put(run, checkpoint_name(step), step, whole=True)
    put(run, "adapter", 60)
    deliver_best(run, best=20, last=60)

    def newest(location: str) -> int | None:
        found = open_source(location).newest()
        return None if found is None else found.step

    assert newest(run.location) == 20
    assert newest(f"{run.location}/adapter-last") == 60
    assert newest(f"{run.location}/checkpoints/step-000040") == 40
    put(run, checkpoint_name(80), 80, whole=True)
    assert newest(run.location) == 80
