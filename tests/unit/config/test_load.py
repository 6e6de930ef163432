"""What a user writes, wrong in every way we could think of, and right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmrl_ray.algorithms.registry import PRESETS
from mmrl_ray.config.load import changed_keys, config_schema, dump_config, load_config, parse_config
from mmrl_ray.config.schema import Config
from mmrl_ray.errors import ConfigError

GOOD = """\
run:
  name: demo
model:
  path: some/model
data:
  train: data/train
algorithm: dapo
learner:
  steps: 10
  lr: 1e-4
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "c.yaml", overrides)
    return str(caught.value).split("\n")


def test_reads_values_defaults_and_preset() -> None:
    cfg = parse_config(GOOD, "c.yaml")
    assert cfg.run.name == "demo"
    assert cfg.learner.lr == 1e-4  # PyYAML alone reads 1e-4 as text
    assert cfg.learner.clip_high == 0.28  # dapo's
    assert cfg.rollout.group_size == 8


def test_written_keys_win_over_the_preset_section_by_section() -> None:
    cfg = parse_config(GOOD.replace("dapo", "grpo") + "  kl: {estimator: k2}\n", "c.yaml")
    assert cfg.learner.kl.estimator == "k2"
    assert cfg.learner.kl.weight == PRESETS["grpo"]["kl"]["weight"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_valid_learner(name: str) -> None:
    needs = {
        "dpo": ["rollout.group_size=2", "data.preferences.store=sqlite:///p.db"],
        "ilql": ["data.rollouts.run=runs/again"],
        "distill": ["teacher.path=org/teacher"],
    }
    cfg = parse_config(GOOD, "c.yaml", [f"algorithm={name}", *needs.get(name, [])])
    for key, value in PRESETS[name].items():
        written = getattr(cfg.learner, key)
        assert (written.model_dump() if isinstance(value, dict) else written) == value


def test_all_errors_at_once_each_with_file_line_key_value_and_remedy() -> None:
    text = """\
run: {name: demo}
modle: {path: x}
model:
  path: x
data:
  trian: d
algorithm: gprpo
rollout:
  group_size: "8"
  workers: true
learner:
  steps: 3
  lrr: 0.5
  kl: 5
"""
    assert problems(text) == [
        'c.yaml:2: modle: unknown key (value {"path": "x"}); did you mean `model`?',
        "c.yaml:5: data.train: required key is missing: add `train:` under `data:`",
        'c.yaml:6: data.trian: unknown key (value "d"); did you mean `train`?',
        "c.yaml:7: algorithm: the value \"gprpo\" is not one of 'reinforce', 'scst', 'rloo', 'grpo', 'dr_grpo', "
        "'dapo', 'gspo', 'cispo', 'dpo', 'ilql', 'raft', 'sapo', 'ppo', 'distill' or 'value_based'; did you mean "
        "`grpo`?",
        'c.yaml:9: rollout.group_size: must be a whole number, not "8": take the quotes away',
        "c.yaml:10: rollout.workers: must be a whole number or a section of `key: value` lines, not true",
        "c.yaml:13: learner.lrr: unknown key (value 0.5); did you mean `lr`?",
        "c.yaml:14: learner.kl: must be a section of `key: value` lines, not 5",
    ]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("rollout: {lr: 1}", "c.yaml:11: rollout.lr: unknown key (value 1); did you mean `sft.lr` or `learner.lr`?"),
        ("zzz: 1", "c.yaml:11: zzz: unknown key (value 1); the keys here are run, model, data"),
        ("reward: {parts: {a: {kind: cider}}, weights: {a: 1}}", 'kind "cider" is not one of'),
        ("reward: {parts: {a: {}}, weights: {a: 1}}", "c.yaml:11: reward.parts.a: add `kind:`"),
        ("reward: {parts: {a: {kind: caption, alfa: 1}}, weights: {a: 1}}", "reward.parts.a.alfa: unknown key"),
        ("reward: {parts: {a: {kind: rouge_l}}, weights: {b: 1}}", "parts ['a'] and weights ['b'] must have the same"),
        ("sft: {steps: 5}", "c.yaml:11: sft: warmup_steps=10 must be below steps=5"),
        ("rollout: {temperature: .inf}", "rollout.temperature: input should be a finite number, not Infinity"),
        ("reward: {weights: {caption: .nan}}", "reward.weights.caption: input should be a finite number, not NaN"),
        ("reward: {weights: {caption: -1}}", "must not be negative"),
        ("reward: {weights: {caption: 0}}", "and not all 0"),
        ("reward: {risk: 0.5}", "reward: risk=0.5 needs a part with a trained sigma"),
        ("reward: {normalize: group}", "set learner.advantage_std to false"),
        ("reward: {normalize: group}\nalgorithm: scst", "no place for the greedy caption"),
        ("rollout: {top_k: 50}", "c.yaml:11: rollout: top_k=50 is refused in training rollouts"),
        ("rollout: {buffer_groups: 3}", "rollout.buffer_groups=3 is smaller than one step"),
        ("rollout: {group_size: 1}", "rollout.group_size=1 is too small"),
        ("learner: {steps: 1, workers: {min: 3, max: 2}}", "learner.workers: min=3 is above max=2"),
        ("learner: {steps: 1, workers: {min: 1, max: 20}}", "learner.workers=20 is above learner.groups_per_step=16"),
        ("learner: {steps: 1, workers: 0}", "learner.workers: "),
        ("learner: {steps: 1, workers: two}", "learner.workers: must be a whole number or a section"),
        ("rollout: {workers: 2, min_workers: 3}", "min_workers=3 is above workers=2"),
        ("- 1", "not valid YAML"),
    ],
)
def test_one_wrong_line(extra: str, expected: str) -> None:
    assert expected in "\n".join(problems(f"{GOOD}{extra}\n"))


def test_a_check_over_several_keys_points_at_the_line_it_names_and_tells_all() -> None:
    text = GOOD + "  warmup_steps: 10\n  lr_min: 1.0\n"
    assert problems(text) == [
        "c.yaml:11: learner: warmup_steps=10 must be below steps=10",
        "c.yaml:12: learner: lr_min=1.0 is above lr=0.0001",
    ]


def test_union_of_types_reads_as_one_problem() -> None:
    assert problems(GOOD.replace("some/model", "x\n  lora: {targets: 5}")) == [
        "c.yaml:5: model.lora.targets: must be a list or text, not 5"
    ]
    assert problems(GOOD.replace("some/model", "x\n  lora: {targets: [q_proj, 5]}")) == [
        "c.yaml:5: model.lora.targets[1]: must be text, not 5"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "c.yaml: the file is empty"),
        ("# only a comment\n", "c.yaml: the file is empty"),
        ("- a\n- b\n", "c.yaml: holds a list, not a config"),
        ("hello", "c.yaml: holds one value ('hello')"),
        ('{\n\t"run": {"name": "x"}\n}', "this looks like JSON: write the config as YAML"),
        ("run: [1,\nb: 2", "c.yaml:2:5: not valid YAML"),
        ("run:\n\tname: x", "c.yaml:2:1: not valid YAML: found character '\\t' that cannot start any token"),
        ("run: !!python/object/apply:os.system [ls]", "c.yaml:1:6: not valid YAML: could not determine a constructor"),
        ("run: &a [*a]", "c.yaml:1:6: not valid YAML: an alias that holds itself"),
        ("a: 1\n---\nb: 2\n", "c.yaml:2:1: not valid YAML"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: \x00", "not a text file"),
    ],
)
def test_not_a_config_at_all_is_one_line(text: str, expected: str) -> None:
    (line,) = problems(text)
    assert expected in line


def test_duplicate_keys_are_refused_beside_other_problems() -> None:
    assert problems(GOOD + "  steps: 12\n  lrr: 1\n") == [
        "c.yaml:11: learner.steps: key written twice (first on line 9); keep one of them",
        "c.yaml:12: learner.lrr: unknown key (value 1); did you mean `lr`?",
    ]


def test_a_merge_key_fills_in_and_is_overridden() -> None:
    text = GOOD + "resources:\n  learner: &a {cpus: 2, gpus: 0.5}\n  rollout: {<<: *a, gpus: 0.25}\n"
    cfg = parse_config(text, "c.yaml")
    assert (cfg.resources.rollout.cpus, cfg.resources.rollout.gpus) == (2, 0.25)


def test_overrides_are_yaml_and_create_sections() -> None:
    cfg = parse_config(
        GOOD,
        "c.yaml",
        ["learner.lr=3e-5", "model.lora.targets=[q_proj, v_proj]", "model.processor={max_pixels: 9}", "data.eval=null"],
    )
    assert cfg.learner.lr == 3e-5
    assert cfg.model.lora.targets == ["q_proj", "v_proj"]
    assert cfg.model.processor == {"max_pixels": 9}
    assert cfg.data.eval is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.lrr=1", "--set learner.lrr: unknown key (value 1); did you mean `lr`?"),
        ("learnr.lr=1", '--set learnr.lr: learnr: unknown key (value {"lr": 1}); did you mean `learner`?'),
        ("learner.lr=fast", '--set learner.lr: must be a number, not "fast"'),
        ("learner.lr=", "--set learner.lr: must be a number, not null"),
        ("learner={steps: 2, lrr: 3}", "--set learner: learner.lrr: unknown key (value 3); did you mean `lr`?"),
        ("learner.steps", "--set learner.steps: write it as key=value, for example --set learner.lr=1e-4"),
        ("learner..lr=1", "--set learner..lr=1: write it as key=value, for example --set learner.lr=1e-4"),
        ("run.name.x=1", "--set run.name.x: run.name is a value, not a section (it is 'demo')"),
        (
            "model.processor={a: [}",
            "--set model.processor:1:6: not valid YAML: expected the node content, but found ']'",
        ),
        ("learner.lr_min=2", "--set learner.lr_min: learner: lr_min=2.0 is above lr=0.0001"),
    ],
)
def test_a_wrong_override_says_which(override: str, expected: str) -> None:
    (line,) = problems(GOOD, override)
    assert line.startswith(expected.split(", but found")[0])


def test_a_value_that_is_no_misspelling_gets_the_choices_and_no_guess() -> None:
    (line,) = problems(GOOD, "algorithm=kto")  # near `dpo`, and something else
    assert line.endswith(
        "'grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo', 'dpo', 'ilql', 'raft', 'sapo', 'ppo', 'distill' or 'value_based'"
    )


def test_environment_variables_are_not_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "leaked")
    cfg = parse_config(GOOD.replace("data/train", "data/${SECRET}/$SECRET"), "c.yaml")
    assert cfg.data.train == "data/${SECRET}/$SECRET"


def test_dump_reads_back_equal_with_awkward_values() -> None:
    cfg = parse_config(
        GOOD,
        "c.yaml",
        ["model.processor={a: '1e-4', b: 1e-4, c: 'no', d: [1, 2.5, null], e: 'é: #x', f: '2026-01-01'}"],
    )
    text = dump_config(cfg)
    again = parse_config(text, "d.yaml")
    assert again == cfg
    assert again.model.processor == cfg.model.processor
    assert again.model.processor["a"] == "1e-4"
    resolved = yaml.safe_load(text)
    assert resolved["learner"]["clip_high"] == 0.28
    assert set(resolved) == set(Config.model_fields)


def test_a_resolved_config_keeps_its_values_under_another_preset() -> None:
    text = dump_config(parse_config(GOOD, "c.yaml"))
    assert parse_config(text, "d.yaml", ["algorithm=gspo"]).learner.clip_high == 0.28


def test_what_a_resume_changes_is_told_key_by_key() -> None:
    before, after = (
        dump_config(parse_config(GOOD, "c.yaml", o)) for o in ((), ("learner.lr=3e-5", "reward.retries=5"))
    )
    assert changed_keys(before, before) == []
    assert changed_keys(before, after) == ["reward.retries: 2 → 5", "learner.lr: 0.0001 → 3e-05"]


def test_configs_are_frozen_and_strict_about_types() -> None:
    cfg = parse_config(GOOD, "c.yaml")
    with pytest.raises(ValueError, match="frozen"):
        cfg.run.seed = 3  # type: ignore[misc]
    assert problems(GOOD + "  max_failures: 2.0\n") == [
        "c.yaml:11: learner.max_failures: must be a whole number, not 2.0"
    ]


def test_no_such_config_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"quikstart.yaml: no such config; did you mean .*/quickstart.yaml\?"):
        load_config(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match=r"nowhere/c.yaml: no such config$"):
        load_config(tmp_path / "nowhere" / "c.yaml")


def test_a_folder_or_a_picture_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder, not a config file$"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match="it is a run folder: pass --resume to go on with it"):
        load_config(tmp_path)
    (tmp_path / "cat.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ConfigError, match=r"not a text file \(byte 0 is not UTF-8\)"):
        load_config(tmp_path / "cat.png")


def _without_descriptions(node: Any) -> list[str]:
    found = []
    for name, section in {"Config": node, **node["$defs"]}.items():
        section = section.get("anyOf", [section])[0]  # the other ones are short forms
        found += [f"{name}.{key}" for key, value in section["properties"].items() if not value.get("description")]
    return found


def test_schema_describes_every_key() -> None:
    schema = config_schema()
    assert _without_descriptions(schema) == []
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["run", "model", "data", "learner"]
    assert schema["$defs"]["RolloutSection"]["properties"]["group_size"]["minimum"] == 1


def test_schema_and_loader_agree() -> None:
    """An independent validator accepts what we accept and refuses what we refuse."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(config_schema())
    good = yaml.safe_load(GOOD.replace("1e-4", "0.0001"))
    assert list(validator.iter_errors(good)) == []
    for path, value in (
        (("learner", "lrr"), 1),
        (("run", "name"), 3),
        (("algorithm",), "x"),
        (("learner", "steps"), 0),
    ):
        bad = copy.deepcopy(good)
        section = bad
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        assert list(validator.iter_errors(bad)), path
        with pytest.raises(ConfigError):
            parse_config(yaml.safe_dump(bad), "c.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.group_size=8"], "rollout.group_size=8 must be 2 with learner.loss=dpo"),
        (["data.preferences=null"], "learner.loss=dpo needs data.preferences: write its store"),
        (["algorithm=grpo"], "data.preferences is read by learner.loss=dpo alone, not by learner.loss=clipped"),
        (["learner.advantage=group"], "advantage=group has no meaning with loss=dpo"),
        (["learner.kl.weight=0.1"], "kl.weight=0.1 is refused with loss=dpo"),
        (["learner.dpo.beta=0"], "learner.dpo.beta: "),
        (["data.preferences.held_out=1"], "data.preferences.held_out: "),
    ],
)
def test_what_does_not_go_with_pairs_is_refused(overrides: list[str], message: str) -> None:
    pairs = ["algorithm=dpo", "rollout.group_size=2", "data.preferences.store=sqlite:///p.db"]
    parse_config(GOOD, "c.yaml", pairs)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_config(GOOD, "c.yaml", [*pairs, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.rollouts=null"], "learner.loss=ilql needs data.rollouts: write the run"),
        (["algorithm=grpo"], "data.rollouts is read by learner.loss=ilql alone, not by learner.loss=clipped"),
        (["learner.advantage=group"], "advantage=group has no meaning with loss=ilql"),
        (["learner.kl.weight=0.1"], "kl.weight=0.1 is refused with loss=ilql"),
        (["learner.sharding=fsdp2"], "sharding=fsdp2 is refused with loss=ilql"),
        (["learner.adapter_l2=0.1"], "have nothing to hold where ilql.bc_weight=0"),
        (["learner.ilql.expectile=1"], "learner.ilql.expectile: "),
        (["learner.ilql.beta=-1"], "learner.ilql.beta: "),
        (["data.rollouts.policy=other"], "data.rollouts.policy: "),
    ],
)
def test_what_does_not_go_with_stored_rollouts_is_refused(overrides: list[str], message: str) -> None:
    stored = ["algorithm=ilql", "data.rollouts.run=runs/again"]
    assert not parse_config(GOOD, "c.yaml", stored).learner.family.trains_adapter
    assert parse_config(GOOD, "c.yaml", [*stored, "learner.ilql.bc_weight=1", "learner.adapter_l2=0.1"])
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_config(GOOD, "c.yaml", [*stored, *overrides])


def test_a_resolved_config_from_before_keeps_what_its_preset_has_gained_since_turned_off() -> None:
    written = dump_config(parse_config(GOOD, "c.yaml")).splitlines()
    new = ("  dynamic_sampling:", "  max_oversampling:", "  overlong:", "    penalty:", "    buffer:")
    before = [line for line in written if not line.startswith(new)]
    assert len(before) == len(written) - len(new)
    assert parse_config(GOOD, "c.yaml").learner.dynamic_sampling
    cfg = parse_config("\n".join(before), "runs/before/config.yaml")
    assert not cfg.learner.dynamic_sampling
    assert cfg.learner.overlong.penalty == 0
    assert cfg.learner.clip_high == 0.28


@pytest.mark.parametrize(
    "key", ["dynamic_sampling=true", "overlong.penalty=1", "mask_truncated=true", "entropy_bonus=0.1"]
)
@pytest.mark.parametrize("algorithm", ["dpo", "ilql"])
def test_what_is_about_captions_of_the_runs_own_is_refused_where_it_has_none(algorithm: str, key: str) -> None:
    needs = {
        "dpo": ["rollout.group_size=2", "data.preferences.store=sqlite:///p.db"],
        "ilql": ["data.rollouts.run=runs/again"],
    }
    (line,) = problems(GOOD, f"algorithm={algorithm}", *needs[algorithm], f"learner.{key}")
    assert f"learner.{key}" in line
    assert "learns from others: take it away" in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.metric=cider"], "eval.metric=cider is no measure of captions; there are reward, "),
        (["eval.metrics=[bleu_5, cider_d]"], "eval.metrics=bleu_5 is no measure of captions; there are reward, "),
        (["eval.metrics=[reward/beauty]"], "eval.metrics=reward/beauty is no measure of captions"),
        (["eval.metric=caption/words"], "eval.metric=caption/words decides which checkpoint is the best, and more"),
        (["data.eval=null"], "eval.every=5 evaluates held-out captions, and there are none: write data.eval"),
        (["eval.every=101"], "eval.every=101 is above learner.steps=100"),
        (["eval.samples=1"], "eval.samples=1 with eval.every=5: one sample has no interval"),
        (["eval.every=null", "eval.patience=2"], "eval.patience: is of evaluations while the run learns: write eval.e"),
        (["eval.min_steps=20"], "eval.min_steps=20 holds eval.patience back, and there is no patience"),
        (["eval.patience=2", "eval.min_steps=101"], "eval.min_steps=101 is above learner.steps=100"),
        (["eval.patience=0"], "eval.patience: "),
        (["eval.evry=5"], "did you mean `every`?"),
        (
            ["algorithm=value_based", "value_based.max_words=8"],
            "eval.every=5 asks rollout workers for captions, and algorithm: value_based has none",
        ),
        (["data.eval_samples=5", "eval.samples=6"], "data.eval_samples=5 is called eval.samples now, which is 6 here"),
    ],
)
def test_what_does_not_go_with_evaluations_is_refused(overrides: list[str], message: str) -> None:
    every = ["data.eval=held-out", "eval.every=5", "learner.steps=100"]
    with pytest.raises(ConfigError) as raised:
        parse_config(GOOD, "c.yaml", [*every, *overrides])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["every=5"], "learner.blind_check.every=5: looks at held-out captions, and there are none: write data.eval"),
        (["on_blind=stop"], "learner.blind_check.on_blind=stop: looks at held-out captions, and there are none"),
        (["every=0", "on_blind=stop"], "on_blind=stop and every=0, which never looks"),
        (["samples=1"], "learner.blind_check.samples: "),
        (["on_blind=halt"], "learner.blind_check.on_blind"),
        (["keep=1"], "learner.blind_check.keep: "),
    ],
)
def test_what_does_not_go_with_looks_is_refused(overrides: list[str], message: str) -> None:
    found = problems(GOOD, *(f"learner.blind_check.{each}" for each in overrides))
    assert any(message in line for line in found)


def test_looks_are_on_where_there_are_held_out_captions() -> None:
    without, watched = parse_config(GOOD, "c.yaml"), parse_config(GOOD, "c.yaml", ["data.eval=held-out"])
    off = parse_config(GOOD, "c.yaml", ["data.eval=held-out", "learner.blind_check.every=0"])
    assert [each.looks_every for each in (without, watched, off)] == [0, 30, 0]
    assert [watched.is_look_due(step) for step in (0, 20, 30)] == [False, False, True]
    for cfg in (without, watched, off):
        assert parse_config(dump_config(cfg), "c.yaml") == cfg
    agent = ["algorithm=value_based", "value_based.max_words=8", "data.eval=held-out", "learner.steps=16"]
    assert parse_config(GOOD, "c.yaml", agent).looks_every == 0
    found = problems(GOOD, *agent, "learner.blind_check.every=5")
    assert any("every=5: asks rollout workers for captions, and this algorithm has none" in line for line in found)


def test_evaluations_take_parts_of_the_reward_and_the_old_name_of_their_samples() -> None:
    overrides = ["data.eval=held-out", "eval.every=5", "learner.steps=100", "eval.metric=reward/caption/bleu"]
    cfg = parse_config(GOOD, "c.yaml", [*overrides, "data.eval_samples=7"])
    assert cfg.eval.logged[:2] == ("reward/caption/bleu", "cider_d")
    assert cfg.eval.samples == 7
    text = dump_config(cfg)
    assert "eval_samples" not in text
    assert parse_config(text, "c.yaml") == cfg
    assert parse_config(GOOD, "c.yaml", ["data.eval_samples=null"]) == parse_config(GOOD, "c.yaml")
