"""What `mmrl serve` is pointed at, and whom it lets in without keys."""

from __future__ import annotations

import json
import socket
import sqlite3
from pathlib import Path

import pytest
import ray

from mmrl_ray.config.serving import ServeConfig
from mmrl_ray.errors import ConfigError, ModelError, ServingError
from mmrl_ray.run_records.run_dir import STATISTICS, RunDir
from mmrl_ray.serving.keys import KeyStore
from mmrl_ray.training.serve import first_key, greeting, local_cpus, serve, serving_config
from tests.support.fake_jobs import SETTINGS
from tests.support.tiny_models import build_family

CONFIG = """
run: {{name: {name}, root: {root}}}
model: {{path: {base}}}
data: {{train: x, prompt: Say it.}}
learner: {{steps: 1}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def make_run(root: Path, name: str, base: str = "some/base") -> str:
    run = RunDir.create(root, name)
    run.write_text("config.yaml", CONFIG.format(name=name, root=root, base=base))
    run.write_text(STATISTICS, "{}")
    return run.location


def test_a_run_is_an_adapter_on_its_base_with_its_reward(tmp_path: Path) -> None:
    run = make_run(tmp_path, "one")
    cfg = serving_config([run])
    assert (cfg.model.path, cfg.adapters, cfg.prompt) == ("some/base", {"one": run}, "Say it.")
    assert cfg.statistics == f"{run}/{STATISTICS}"
    assert cfg.reward is not None


def test_several_runs_of_one_base_go_together_and_others_do_not(tmp_path: Path) -> None:
    one, two, other = make_run(tmp_path, "one"), make_run(tmp_path, "two"), make_run(tmp_path, "far", "another/base")
    assert serving_config([one, two]).adapters == {"one": one, "two": two}
    with pytest.raises(ConfigError, match=r"trained on another/base, not on some/base"):
        serving_config([one, other])
    with pytest.raises(ConfigError, match="two runs are called one"):
        serving_config([one, one])
    with pytest.raises(ConfigError, match="two models"):
        serving_config(["some/base", "another/base"])


def test_a_value_based_run_is_its_agent_by_itself(tmp_path: Path) -> None:
    other = make_run(tmp_path, "other")
    run = RunDir.create(tmp_path, "agent")
    text = (
        CONFIG.format(name="agent", root=tmp_path, base="some/base")
        + "algorithm: value_based\nvalue_based: {updates: 1}\n"
    )
    run.write_text("config.yaml", text)
    cfg = serving_config([run.location])
    assert (cfg.agent, cfg.adapters, cfg.serving.model_id) == (run.location, {}, "agent")
    for targets in ([other, run.location], [run.location, other], ["some/base", run.location]):
        with pytest.raises(ConfigError, match="is served by itself, without other targets"):
            serving_config(targets)


def test_a_model_alone_has_no_reward(tmp_path: Path) -> None:
    cfg = serving_config(["some/base"])
    assert (cfg.model.path, cfg.adapters, cfg.reward) == ("some/base", {}, None)


def test_a_model_that_cannot_be_used_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    model = build_family("llava", tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(ModelError, match=rf"model '{model}': its chat template leaves out what the assistant says"):
        serve([str(model)], insecure=True)
    assert not ray.is_initialized()


def test_a_slip_that_reads_like_the_hubs_id_is_told_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(
        ModelError, match=r"run/mine.*config\.json cannot be read.*; there is no folder run; did you mean runs"
    ):
        serve(["run/mine"], port=free_port(), insecure=True)
    assert not ray.is_initialized()


def test_a_ray_of_its_own_has_room_for_jobs(tmp_path: Path) -> None:
    cfg = serving_config(["some/base"])
    tuned = cfg.model_copy(update={"serving": cfg.serving.model_copy(update={"fine_tuning": SETTINGS.fine_tuning})})
    # Each of four jobs: one learner and one rollout worker of one CPU; the reward asks for none.
    assert local_cpus(tuned) - local_cpus(cfg) == 4 * 2


def test_overrides_and_then_host_and_port_win(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: {path: b}\nreward: null\nserving: {port: 1, max_rank: 5}\n")
    cfg = serving_config([str(file)], ["serving.port=2", "serving.max_rank=7"], port=3, host="0.0.0.0")
    assert (cfg.serving.port, cfg.serving.max_rank, cfg.serving.host) == (3, 7, "0.0.0.0")


def test_places_of_a_config_are_those_of_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: {path: base}\nadapters: {a: runs/a, far: 's3://b/r'}\nstatistics: runs/a/reward/statistics.json\n"
        "serving:\n  adapters_root: runs\n  runs_root: runs\n  database: sqlite:///keys.db\n"
        "  fine_tuning:\n    models: {m: {model: {path: owner/m}, learner: {steps: 1}}}\n    datasets: {d: data/d}\n"
        "    root: runs\n"
    )
    cfg = serving_config([str(file)])
    assert (cfg.model.path, cfg.statistics) == (f"{tmp_path}/base", f"{tmp_path}/runs/a/reward/statistics.json")
    assert cfg.adapters == {"a": f"{tmp_path}/runs/a", "far": "s3://b/r"}
    serving = cfg.serving
    assert (serving.adapters_root, serving.runs_root) == (f"{tmp_path}/runs", f"{tmp_path}/runs")
    assert serving.database == f"sqlite:///{tmp_path}/keys.db"
    assert serving.fine_tuning is not None
    assert (serving.fine_tuning.root, serving.fine_tuning.datasets) == (f"{tmp_path}/runs", {"d": f"{tmp_path}/data/d"})
    assert serving.fine_tuning.models["m"].model.path == "owner/m"
    with pytest.raises(ConfigError) as error:
        serve([str(file)])
    assert [line.split(" does not exist")[0] for line in str(error.value).splitlines()] == [
        f"adapters.a={tmp_path}/runs/a",
        f"statistics={tmp_path}/runs/a/reward/statistics.json",
        f"serving.fine_tuning.datasets.d={tmp_path}/data/d",
    ]


def test_a_place_that_is_not_there_is_told_at_once_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs", "smolvlm-coca")
    with pytest.raises(ConfigError) as error:  # the shipped one
        serve([str(Path(__file__).parents[3] / "configs" / "serve.yaml")])
    first = str(error.value).splitlines()[0]
    assert first.endswith(f"/runs/smolvlm-coco does not exist; did you mean {tmp_path}/runs/smolvlm-coca?")


def test_a_port_that_is_taken_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=rf"cannot listen on 127\.0\.0\.1:{port}: another program listens there"):
            serve(["some/base"], port=port, insecure=True)
    with pytest.raises(ServingError, match=r"cannot listen on 192\.0\.2\.1:80"):
        serve(["some/base"], host="192.0.2.1", port=80)
    assert not ray.is_initialized()


def test_nothing_is_made_for_a_server_that_could_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "one", "builtin:tiny-llava")  # whose base is not there any more
    monkeypatch.setattr("mmrl_ray.training.serve.base_for_use", lambda cfg, run: pytest.fail("it is made anew first"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ServingError, match="another program listens"):
        serve([run], port=taken.getsockname()[1], insecure=True)


def test_a_key_database_that_takes_no_key_is_told_before_anything_is_started(tmp_path: Path) -> None:
    file = tmp_path / "keys.db"
    store = KeyStore(f"sqlite:///{file}")
    store.create("one", ["infer"])
    store.try_writing()
    assert [record.name for record in store.list()] == ["one"]
    with sqlite3.connect(file) as connection:  # as full as its disk
        connection.execute("CREATE TABLE other (x)")
        connection.execute("CREATE TRIGGER full BEFORE INSERT ON mmrl_keys BEGIN SELECT RAISE(FAIL, 'it is full'); END")
    connection.close()
    database = json.dumps(f"sqlite:///{file}")
    with pytest.raises(ServingError, match=r"key database sqlite:.*keys\.db: it is full"):
        serve(["some/base"], port=free_port(), overrides=[f"serving.database={database}"])
    file.write_text("no database at all, but some text that is long enough to be looked at by SQLite as a header")
    with pytest.raises(ServingError, match=r"key database sqlite:.*keys\.db: file is not a database"):
        serve(["some/base"], port=free_port(), overrides=[f"serving.database={database}"])
    assert not ray.is_initialized()


def test_a_reward_without_its_statistics_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: {path: b}\n")
    with pytest.raises(ConfigError, match="statistics"):
        serving_config([str(file)])
    rouge = ["reward.parts.r.kind=rouge_l", "reward.weights.r=1.0"]
    assert serving_config([str(file)], rouge).statistics is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_without_keys_only_on_loopback(host: str) -> None:
    with pytest.raises(ConfigError, match="loopback address only"):
        serve(["some/base"], host=host, insecure=True, print_config=True)


def test_without_keys_only_on_a_local_ray_and_without_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="local Ray"):
        serve(["some/base"], address="10.0.0.1:6379", insecure=True, print_config=True)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="HAProxy"):
        serve(["some/base"], insecure=True, print_config=True)


def test_the_first_key_is_made_once(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'keys.db'}"
    cfg = ServeConfig.model_validate({"model": {"path": "b"}, "reward": None, "serving": {"database": database}})
    first = "\n".join(greeting(cfg, insecure=False))
    assert "Bearer mmrl-" in first
    assert first_key(database) is None
    again = "\n".join(greeting(cfg, insecure=False))
    assert "mmrl-" not in again
    assert "$MMRL_API_KEY" in again
