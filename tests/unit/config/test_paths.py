"""What of a config another machine would look for in vain."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmrl_ray.config import Config
from mmrl_ray.config.load import parse_config
from mmrl_ray.config.paths import local_paths, refuse_missing, refuse_unseen, with_absolute_paths
from mmrl_ray.errors import ConfigError

LOCAL = """
run: {name: a}
model: {path: ./base}
data: {train: data/train, eval: /mnt/shared/eval}
sft: {steps: 3, warmup_steps: 0}
learner: {steps: 3}
"""
REMOTE = """
run: {name: a, root: s3://bucket/runs}
model: {path: org/base}
data: {train: s3://bucket/train, eval: gs://bucket/eval}
learner: {steps: 3}
"""


def absolute(text: str) -> Config:
    return with_absolute_paths(parse_config(text, "test"))


def test_every_path_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        refuse_unseen(absolute(LOCAL), (), "the cluster at http://head:8265")
    lines = str(error.value).splitlines()
    assert [line.split("=")[0] for line in lines] == ["run.root", "data.train", "data.eval", "model.path", "sft.cache"]
    assert (
        f"data.train={tmp_path}/data/train is a path of this machine, which the cluster at http://head:8265" in lines[1]
    )
    assert "such as --set data.train=s3://bucket/data; or, if all nodes" in lines[1]
    assert lines[1].endswith(f"add --shared-paths {tmp_path}/data")


def test_a_store_in_a_file_is_a_path_and_one_by_network_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    pairs = "algorithm: dpo\nrollout: {group_size: 2}\n"
    data = "data: {train: data/train, eval: /mnt/shared/eval"
    text = LOCAL.replace(data, data + ", preferences: {store: 'sqlite:///votes.db'}") + pairs
    cfg = absolute(text)
    assert cfg.data.preferences is not None
    assert cfg.data.preferences.store == f"sqlite:///{tmp_path}/votes.db"
    with pytest.raises(
        ConfigError, match=r"data\.preferences\.store=.*/votes\.db is a path of this machine.*PostgreSQL"
    ):
        refuse_unseen(cfg, ("/mnt/shared/",), "it")
    url = "postgresql+psycopg://mmrl@db/votes"
    assert "data.preferences.store" not in local_paths(absolute(text.replace("sqlite:///votes.db", url)))


def test_the_run_whose_rollouts_are_learnt_from_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    data = "data: {train: data/train, eval: /mnt/shared/eval"
    text = LOCAL.replace(data, data + ", rollouts: {run: runs/again}") + "algorithm: ilql\n"
    cfg = absolute(text)
    assert local_paths(cfg)["data.rollouts.run"] == f"{tmp_path}/runs/again"
    with pytest.raises(ConfigError, match=r"data\.rollouts\.run=.*/runs/again is a path of this machine"):
        refuse_unseen(cfg, ("/mnt/shared/",), "it")
    with pytest.raises(ConfigError, match=r"data\.rollouts\.run=.*/runs/again does not exist"):
        refuse_missing(cfg)


def test_shared_paths_and_uris_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    refuse_unseen(absolute(REMOTE), (), "it")
    refuse_unseen(absolute(LOCAL), ("/mnt/shared/", str(tmp_path)), "it")
    for shared in (("/mnt/share", str(tmp_path)), ("/mnt/shared/eval/x", str(tmp_path)), ("/mnt/shared",)):
        with pytest.raises(ConfigError):
            refuse_unseen(absolute(LOCAL), shared, "it")
    sly = absolute(LOCAL.replace("/mnt/shared/eval", "/mnt/shared/../eval"))
    with pytest.raises(ConfigError, match=r"^data\.eval=/mnt/shared/\.\./eval"):
        refuse_unseen(sly, ("/mnt/shared", str(tmp_path)), "it")


@pytest.mark.parametrize(
    ("model", "is_path"),
    [("org/base", False), ("builtin:tiny-llava", False), ("/m", True), ("../m", True), ("~/m", True)],
)
def test_a_model_is_a_path_or_an_id(model: str, is_path: bool) -> None:
    cfg = parse_config(REMOTE.replace("org/base", model), "test")
    assert ("model.path" in local_paths(cfg)) == is_path


def test_a_folder_that_looks_like_an_id_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert local_paths(absolute(REMOTE)) == {"model.path": f"{tmp_path}/org/base"}


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    with pytest.raises(ConfigError) as error:
        refuse_missing(absolute(LOCAL))
    assert str(error.value).splitlines() == [
        f"data.train={tmp_path}/data/train does not exist: check the path",
        "data.eval=/mnt/shared/eval does not exist: check the path",
    ]
    scenes = LOCAL.replace("data: {", "data: {scenes: {train: 3, eval: 1}, ")
    refuse_missing(absolute(scenes))
    refuse_missing(absolute(REMOTE))


def test_a_learned_reward_is_a_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = LOCAL + "reward: {parts: {seen: {kind: learned, model: rewards/a}}, weights: {seen: 1.0}}\n"
    cfg = absolute(text)
    assert local_paths(cfg)["reward.parts.seen.model"] == f"{tmp_path}/rewards/a"
    with pytest.raises(ConfigError, match=r"reward.parts.seen.model=.*: name a folder on storage that every node sees"):
        refuse_unseen(cfg, (), "the cluster")
    with pytest.raises(ConfigError, match=r"reward.parts.seen.model=.* does not exist"):
        refuse_missing(cfg)
