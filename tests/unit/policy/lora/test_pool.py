"""Several adapters on one policy: files that are refused, who stays, and rows that share a pass."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from mmrl_ray.config.sections import LoraSection
from mmrl_ray.errors import AdapterError, OverloadedError, UnknownModelError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, Failure, decode_groups
from mmrl_ray.policy.lora.adapter import adapter_parameters, add_adapter, load_adapter, save_adapter
from mmrl_ray.policy.lora.pool import AdapterPool, AdapterVersion
from mmrl_ray.policy.lora.routing import BASE
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.run_records.run_dir import CONFIG_FILE, WEIGHTS_FILE
from tests.support.tiny_models import FAMILIES, build_family, make_samples

Load = Callable[..., Policy]
MakeAdapter = Callable[..., Path]
GREEDY = SamplingParams(max_new_tokens=8, greedy=True)


class FakeSource:
    """A folder whose version is set by hand."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.folder, self.step = folder, step
        self.opened = 0

    def checkpoint(self, step: int) -> None:
        """A folder has none."""

    def newest(self) -> AdapterVersion | None:
        return None if self.step < 0 else AdapterVersion(self.step, f"{self.folder}-{self.step}", 7)

    @contextmanager
    def open(self, version: AdapterVersion) -> Iterator[Path]:
        self.opened += 1
        yield self.folder


@pytest.fixture
def make_adapter(load: Load, tmp_path: Path) -> MakeAdapter:
    """Saves an adapter that is felt."""

    def make(seed: int, family: str = "llava", **section: Any) -> Path:
        policy = load(family)
        add_adapter(policy, LoraSection(**{"r": 4, "alpha": 12, **section}), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(policy.model):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path / f"{family}-{seed}-{len(list(tmp_path.iterdir()))}"
        save_adapter(policy.model, folder)
        return folder

    return make


def make_pool(policy: Policy, sources: dict[str, FakeSource], max_adapters: int = 3) -> AdapterPool:
    pool = AdapterPool(policy, lambda: sources, max_adapters=max_adapters, max_rank=16)
    pool.scan()
    return pool


def put_on(pool: AdapterPool, *ids: str) -> list[str]:
    """Installs and leases; PEFT names."""
    names = []
    for id in ids:
        pool.install(pool.read(id))
        resident = pool.lease(id)
        assert resident is not None
        names.append(resident.name)
    return names


def ids_of(decoder: Decoder, handle: int) -> list[int]:
    return decoder.take(handle).completions[0].token_ids.tolist()


def alone(policy: Policy, adapter: Path | None, index: int) -> tuple[list[int], torch.Tensor]:
    """What a policy with that one adapter says to sample `index`: tokens and log-probs."""
    if adapter is not None:
        load_adapter(policy, adapter)
    [prompt] = encode_prompts(policy, [make_samples()[index]])
    made = decode_groups(Decoder(policy), [DecodeRequest(prompt, 1, GREEDY)])[0].completions[0]
    return made.token_ids.tolist(), made.logprobs


def on_model(policy: Policy) -> set[str]:
    return set(policy.model.peft_config) if isinstance(policy.model, PeftModel) else set()


# -- rows of several adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "packed"), [*((family, None) for family in FAMILIES), ("llava", False)])
def test_rows_of_several_adapters_share_passes(
    family: str, packed: bool | None, load: Load, make_adapter: MakeAdapter
) -> None:
    one, two = make_adapter(1, family), make_adapter(2, family, r=2, targets=r".*(language|text)_model.*(q|v)_proj")
    expected = [alone(load(family), adapter, i) for i, adapter in enumerate((one, two, None))]
    said = {tuple(alone(load(family), adapter, 0)[1].tolist()) for adapter in (one, two, None)}
    assert len(said) == 3, "the adapters make a difference"
    policy = load(family)
    pool = make_pool(policy, {"one": FakeSource(one), "two": FakeSource(two)})
    names = [*put_on(pool, "one", "two"), BASE]
    prompts = encode_prompts(policy, make_samples())
    decoder = Decoder(policy, packed=packed, adapters=pool.rows)
    handles = [decoder.admit(prompt, 2, GREEDY, adapter=name) for prompt, name in zip(prompts, names, strict=True)]
    decoder.drain()
    assert (decoder.counters["prefills"], decoder.counters["passes"]) == (1, 7)
    for handle, (tokens, logprobs) in zip(handles, expected, strict=True):
        for made in decoder.take(handle).completions:
            assert made.token_ids.tolist() == tokens
            torch.testing.assert_close(made.logprobs, logprobs, rtol=0, atol=1e-4)


def test_rows_of_several_adapters_compute_what_peft_computes_of_them(load: Load, make_adapter: MakeAdapter) -> None:
    """Bit for bit, by PEFT's own `adapter_names`."""
    policy = load()
    sources = {
        "one": FakeSource(make_adapter(1)),
        "two": FakeSource(make_adapter(2, r=2, targets=r".*language_model.*q_proj")),
    }
    pool = make_pool(policy, sources)
    one, two = put_on(pool, "one", "two")
    names = [two, BASE, one, two, BASE]
    ids = torch.arange(35).reshape(5, 7) % policy.placeholder_id  # no picture
    with torch.no_grad():
        expected = policy.model(input_ids=ids, adapter_names=names).logits
        with pool.rows.on(names):
            found = policy.model(input_ids=ids).logits
        with pool.rows.on([one]):
            alone = policy.model(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, alone)


def test_rows_join_and_leave_whatever_adapter_they_use(load: Load, make_adapter: MakeAdapter) -> None:
    one, two = make_adapter(1), make_adapter(2)
    expected = {key: alone(load(), adapter, 0)[0] for key, adapter in (("one", one), ("two", two), (BASE, None))}
    policy = load()
    pool = make_pool(policy, {"one": FakeSource(one), "two": FakeSource(two)})
    names = {**dict(zip(("one", "two"), put_on(pool, "one", "two"), strict=True)), BASE: BASE}
    [prompt] = encode_prompts(policy, make_samples()[:1])
    decoder = Decoder(policy, adapters=pool.rows)
    handles: dict[int, str] = {}
    for i, key in enumerate(("one", BASE, "two", "two", BASE, "one", "one")):
        handles[decoder.admit(prompt, 1 + i % 2, GREEDY, adapter=names[key])] = key
        passing = decoder.admit(prompt, 1, GREEDY, adapter=names["two"])
        decoder.step()
        decoder.step()
        decoder.cancel(passing)
    decoder.drain()
    assert decoder.counters["merges"] > 3
    assert decoder.counters["compactions"] > 3
    assert [ids_of(decoder, handle) for handle in handles] == [expected[key] for key in handles.values()]


def test_an_adapter_on_the_vision_tower_makes_features_of_its_own(load: Load, make_adapter: MakeAdapter) -> None:
    everywhere = make_adapter(1, targets=r".*(q_proj|v_proj|linear_1)", adapt_vision=True)
    expected = [alone(load(), adapter, 0)[0] for adapter in (everywhere, None)]
    policy = load()
    pool = make_pool(policy, {"one": FakeSource(everywhere)})
    [name] = put_on(pool, "one")
    assert pool.rows.adapts_vision
    [prompt] = encode_prompts(policy, make_samples()[:1])
    for inject in (True, False):
        policy.inject_vision = inject
        decoder = Decoder(policy, vision_cache=VisionCache(1 << 20), adapters=pool.rows)
        handles = [decoder.admit(prompt, 1, GREEDY, adapter=adapter) for adapter in (name, BASE)]
        decoder.drain()
        assert [ids_of(decoder, handle) for handle in handles] == expected


def test_groups_name_an_adapter_exactly_where_they_can(load: Load) -> None:
    policy = load()
    [prompt] = encode_prompts(policy, make_samples()[:1])
    with pytest.raises(ValueError, match="adapter='x'"):
        Decoder(policy).admit(prompt, 1, GREEDY, adapter="x")
    pool = make_pool(policy, {})
    with pytest.raises(ValueError, match="adapter=None"):
        Decoder(policy, adapters=pool.rows).admit(prompt, 1, GREEDY)


def test_an_adapter_that_breaks_takes_only_its_own_rows_down(load: Load, make_adapter: MakeAdapter) -> None:
    one, two = make_adapter(1), make_adapter(2)
    policy = load()
    pool = make_pool(policy, {"one": FakeSource(one), "two": FakeSource(two)})
    names = put_on(pool, "one", "two")
    [prompt] = encode_prompts(policy, make_samples()[:1])
    decoder = Decoder(policy, adapters=pool.rows)
    bad, good = (decoder.admit(prompt, 2, GREEDY, adapter=name) for name in names)
    failures: list[Failure] = []
    decoder.step(failures)
    decoder.step(failures)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if names[0] in name:
                parameter.fill_(float("nan"))
    decoder.step(failures)
    assert [failure.handle for failure in failures] == [bad]
    assert "NaN at token 2" in str(failures[0].error)
    decoder.drain()
    assert ids_of(decoder, good) == alone(load(), two, 0)[0]


# -- who is on the model -----------------------------------------------------------------------------------------------


def test_a_new_version_stands_beside_the_old_until_its_rows_have_finished(
    load: Load, make_adapter: MakeAdapter
) -> None:
    first, second = make_adapter(1), make_adapter(2)
    policy = load()
    source = FakeSource(first, step=1)
    pool = make_pool(policy, {"one": source}, max_adapters=1)
    assert pool.lease("one") is None
    pool.install(pool.read("one"))
    old = pool.lease("one")
    assert old is not None
    assert pool.scan() == []
    source.folder, source.step = second, 2
    assert pool.scan() == ["one"]
    assert pool.infos()[0].version.step == 1, "until the new one is on, requests get the old"
    pool.install(pool.read("one"))
    new = pool.lease("one")
    assert new is not None
    assert (old.version.step, new.version.step, pool.infos()[0].version.step) == (1, 2, 2)
    assert on_model(policy) == {old.name, new.name}
    [prompt] = encode_prompts(policy, make_samples()[:1])
    decoder = Decoder(policy, adapters=pool.rows)
    handles = [decoder.admit(prompt, 1, GREEDY, adapter=name) for name in (old.name, new.name)]
    decoder.drain()
    assert [ids_of(decoder, h) for h in handles] == [alone(load(), f, 0)[0] for f in (first, second)]
    pool.sweep()
    assert on_model(policy) == {old.name, new.name}
    pool.release(old)
    pool.sweep()
    assert on_model(policy) == {new.name}
    handle = decoder.admit(prompt, 1, GREEDY, adapter=new.name)
    decoder.drain()
    assert ids_of(decoder, handle) == alone(load(), second, 0)[0]


def test_the_least_recently_used_makes_room_and_one_in_use_never(load: Load, make_adapter: MakeAdapter) -> None:
    policy = load()
    pool = make_pool(policy, {id: FakeSource(make_adapter(i)) for i, id in enumerate("abcd", start=1)}, max_adapters=2)
    for id in "ab":
        pool.install(pool.read(id))
    a, b = pool.lease("a"), pool.lease("b")
    assert a is not None
    assert b is not None
    with pytest.raises(OverloadedError, match="'c' is not loaded and all 2 that fit are in use"):
        pool.install(pool.read("c"))
    pool.release(b)
    pool.release(a)
    pool.release(pool.lease("a") or a)
    pool.install(pool.read("c"))
    assert pool.lease("b") is None
    assert len(on_model(policy)) == 2
    assert pool.lease("a") is a
    pool.install(pool.read("d"))
    assert pool.lease("c") is None
    assert pool.lease("d") is not None


def test_without_adapters_the_model_is_the_base_again(load: Load, make_adapter: MakeAdapter) -> None:
    policy = load()
    modules = [type(module) for module in policy.model.modules()]
    weights = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    pool = make_pool(policy, {"one": FakeSource(make_adapter(1))})
    pool.install(pool.read("one"))
    resident = pool.lease("one")
    assert resident is not None
    assert all(not p.requires_grad for p in policy.model.parameters())
    assert not policy.model.training
    pool._retired.append(pool._current.pop("one"))
    pool.release(resident)
    pool.sweep()
    assert [type(module) for module in policy.model.modules()] == modules
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.model.state_dict().items())
    pool.install(pool.read("one"))
    assert len(on_model(policy)) == 1


def test_installing_one_version_twice_changes_nothing(load: Load, make_adapter: MakeAdapter) -> None:
    policy = load()
    pool = make_pool(policy, {"one": FakeSource(make_adapter(1))})
    read = pool.read("one")
    pool.install(read)
    before = on_model(policy)
    pool.install(read)
    assert on_model(policy) == before


def test_weights_are_float32_on_a_bfloat16_base_and_drawn_from_nothing(load: Load, make_adapter: MakeAdapter) -> None:
    folder = make_adapter(1)
    policy = load(dtype="bfloat16")
    state = torch.random.get_rng_state()
    [name] = put_on(make_pool(policy, {"one": FakeSource(folder)}), "one")
    assert torch.equal(torch.random.get_rng_state(), state)
    saved = load_file(folder / WEIGHTS_FILE)
    found = {n.replace(f".{name}", ""): p for n, p in policy.model.named_parameters() if name in n}
    assert found.keys() == saved.keys()
    assert all(p.dtype == torch.float32 and torch.equal(p, saved[n]) for n, p in found.items())


def test_ids_that_are_none_and_sources_that_fail_are_left_out(load: Load, make_adapter: MakeAdapter) -> None:
    class Broken(FakeSource):
        def newest(self) -> AdapterVersion | None:
            raise OSError("no such host")

    folder = make_adapter(1)
    sources = {id: FakeSource(folder) for id in ("ok-1.2_x", "../up", "a/b", "", ".hidden", "x" * 65, "a\n")}
    sources |= {"broken": Broken(folder), "none-yet": FakeSource(folder, step=-1)}
    pool = make_pool(load(), sources)
    assert [info.id for info in pool.infos()] == ["ok-1.2_x"]
    for id in ("../up", "none-yet", "nobody"):
        with pytest.raises(UnknownModelError):
            pool.lease(id)
        with pytest.raises(UnknownModelError):
            pool.read(id)


def test_a_policy_with_an_adapter_has_no_pool(load: Load) -> None:
    policy = load()
    add_adapter(policy, LoraSection(r=2), seed=0)
    with pytest.raises(AdapterError, match="has an adapter already"):
        make_pool(policy, {})


# -- what is refused ---------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    change(state)
    save_file(state, folder / WEIGHTS_FILE)


def first(state: dict[str, torch.Tensor], part: str = "lora_A") -> str:
    return next(name for name in sorted(state) if part in name)


def link_weights(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / WEIGHTS_FILE).rename(outside)
    (folder / WEIGHTS_FILE).symlink_to(outside)


def pickle_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps({"a": 1}))


def huge_rank(folder: Path) -> None:
    edit_config(folder, r=1_000_000_000)


def only_layer_0(state: dict[str, torch.Tensor]) -> None:
    for name in [name for name in state if ".layers.1." in name]:
        del state[name]


def fewer_targets(folder: Path) -> None:
    edit_config(folder, target_modules=r".*language_model.*q_proj")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "linked weights": (link_weights, "symbolic link"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "it has no adapter_model.safetensors"),
    "pickled weights": (pickle_weights, "is broken"),
    "pickled beside": (lambda f: (f / WEIGHTS_FILE).rename(f / "adapter_model.bin"), "it has no adapter_model"),
    "truncated": (lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-9]), "is broken"),
    "NaN": (lambda f: edit_weights(f, lambda s: s[first(s)].view(-1)[2:3].fill_(float("nan"))), "NaN or infinity"),
    "infinity": (lambda f: edit_weights(f, lambda s: s[first(s)].view(-1)[2:3].fill_(float("inf"))), "NaN or inf"),
    "rank in the config": (huge_rank, "rank r=1000000000; from 1 to 16"),
    "rank above the cap": (lambda f: edit_config(f, r=17), "rank r=17"),
    "rank 0": (lambda f: edit_config(f, r=0), "rank r=0"),
    "rank of the weights": (lambda f: edit_config(f, r=8), "with another rank"),
    "width": (lambda f: edit_weights(f, lambda s: s.update({first(s): s[first(s)][:, :-1].clone()})), "has shape"),
    "half a pair": (lambda f: edit_weights(f, lambda s: s.pop(first(s, "lora_B"))), "1 missing (base_model.model."),
    "half the layers": (lambda f: edit_weights(f, only_layer_0), "14 missing (base_model.model.model.language_model."),
    "other targets": (lambda f: edit_config(f, target_modules=["q_proj"]), "4 missing (base_model.model.model.vision_"),
    "fewer targets": (fewer_targets, "0 missing, 24 unknown (base_model.model.model.language_model.layers.0.mlp.down"),
    "targets by a pattern": (lambda f: edit_config(f, target_modules=r".*\.layers\.1\..*"), "14 unknown"),
    "a pattern without end": (lambda f: edit_config(f, target_modules=r"(.|.)*\d{9}"), "takes more than 2 s"),
    "no pattern": (lambda f: edit_config(f, target_modules="(a"), "is not a regular expression"),
    "no targets": (lambda f: edit_config(f, target_modules=None), "names no target_modules"),
    "stray name": (lambda f: edit_weights(f, lambda s: s.update(x=torch.zeros(1))), "belongs to no linear layer"),
    "integers": (
        lambda f: edit_weights(f, lambda s: s.update({first(s): s[first(s)].int()})),
        "no floating-point type",
    ),
    "too large": (lambda f: edit_weights(f, lambda s: s.update(x=torch.zeros(5 << 20))), "at most"),
    "no weights at all": (lambda f: save_file({}, f / WEIGHTS_FILE), "28 missing"),
    "alpha": (lambda f: edit_config(f, lora_alpha=float("nan")), "lora_alpha=nan"),
    "no JSON": (lambda f: (f / CONFIG_FILE).write_text("{"), "cannot be read"),
    "a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), ""),
    "deep JSON": (lambda f: (f / CONFIG_FILE).write_text("[" * 100_000), ""),
    "large config": (lambda f: (f / CONFIG_FILE).write_text(" " * (1 << 20) + "{}"), "no adapter's"),
    "not LoRA": (lambda f: edit_config(f, peft_type="LOHA"), ""),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "use_dora"),
    "whole modules": (lambda f: edit_config(f, modules_to_save=["lm_head"]), "modules that were trained whole"),
    "a rank without end": (lambda f: edit_config(f, rank_pattern={r"(.|.)*\d{9}": 4}), "takes more than 2 s"),
    "a rank of one layer": (lambda f: edit_config(f, rank_pattern={"q_proj": 5}), "with another rank"),
    "a rank too high": (lambda f: edit_config(f, rank_pattern={"q_proj": 500}), "r=500"),
    "replication": (lambda f: edit_config(f, layer_replication=[[0, 2], [0, 2]]), "layer_replication"),
    "an import": (lambda f: edit_config(f, megatron_config={"a": 1}, megatron_core="antigravity"), "megatron"),
    "another base": (lambda f: edit_config(f, base_model_name_or_path="OTHER"), "made for another base"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_is_not_a_sound_adapter_of_this_model_is_refused(
    name: str, load: Load, make_adapter: MakeAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage, message = DAMAGES[name]
    folder = make_adapter(1)
    damage(folder)
    if name == "another base":
        edit_config(folder, base_model_name_or_path=str(build_family("llava", tmp_path / "other", seed=5)))
    policy = load()
    before = policy.model
    source = FakeSource(folder)
    pool = make_pool(policy, {"bad": source})
    for _ in range(2):
        with pytest.raises(UnknownModelError, match="adapter 'bad' of step 0 cannot be used") as raised:
            pool.read("bad")
        assert str(tmp_path) not in str(raised.value)
    assert source.opened == 1, "a version that was refused is not read again"
    assert message in caplog.text
    assert policy.model is before
    assert pool.infos() == []
    # A sound version takes its place.
    source.folder, source.step = make_adapter(2), 3
    pool.scan()
    pool.install(pool.read("bad"))
    assert [info.version.step for info in pool.infos()] == [3]


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        r".*\.(q|v)_proj",
        r"model\.language_model\..*\.(q|v)_proj",
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*vision.*"},
        "all-linear",
    ],
)
def test_an_adapter_of_another_program_is_whole_where_peft_would_take_it_as_whole(
    targets: Any, load: Load, tmp_path: Path
) -> None:
    """PEFT's own saved folder, its config as the user wrote it: the tensors that its targets make, no more, no less."""
    fields = targets if isinstance(targets, dict) else {"target_modules": targets}
    made = get_peft_model(load().hf_model, LoraConfig(r=2, **fields))
    state = {name: tensor + 0.1 for name, tensor in get_peft_model_state_dict(made).items()}
    made.save_pretrained(tmp_path)
    save_file(state, tmp_path / WEIGHTS_FILE)
    edit_config(tmp_path, **fields)
    policy = load()
    [name] = put_on(make_pool(policy, {"theirs": FakeSource(tmp_path)}), "theirs")
    found = {n.replace(f".{name}", ""): p for n, p in policy.model.named_parameters() if name in n}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[n], state[n]) for n in state)
    edit_weights(tmp_path, lambda s: s.pop(first(s, "lora_A")))
    with pytest.raises(AdapterError, match="1 missing"):
        load_adapter(load(), tmp_path)
    with pytest.raises(UnknownModelError):
        make_pool(load(), {"theirs": FakeSource(tmp_path)}).read("theirs")


def test_the_same_base_in_another_folder_is_the_same_base(
    load: Load, make_adapter: MakeAdapter, copied: Callable[[str], Path]
) -> None:
    folder = make_adapter(1)
    for named in (str(copied("llava")), "/nowhere/now", "owner/name", ""):
        edit_config(folder, base_model_name_or_path=named)
        pool = make_pool(load(), {"one": FakeSource(folder)})
        assert pool.read("one").id == "one"
