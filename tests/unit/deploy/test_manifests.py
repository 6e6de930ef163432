"""Manifests: KubeRay's definitions take them, they say what the config says, and the shipped ones are up to date."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmrl_ray.config import Config
from mmrl_ray.config.load import load_any_config, parse_config
from mmrl_ray.config.serving import ServeConfig
from mmrl_ray.deploy.manifests import dump, render
from mmrl_ray.errors import ConfigError
from mmrl_ray.serving.launch import check_serve_config

from ..cli.program import mmrl
from .crds import ROOT, problems, strict

SHIPPED = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
DATABASE = "postgresql+psycopg://mmrl@postgres/mmrl"
Object = dict[str, Any]


def run(**sections: Any) -> Config:
    merged: Object = {
        "run": {"name": "demo"},
        "model": {"path": "org/model"},
        "data": {"train": "data/train", "eval": "data/eval"},
        "rollout": {"workers": 3},
        "learner": {"steps": 10, "workers": 2},
        "resources": {"placement": "split", "learner": {"cpus": 4, "gpus": 1}, "rollout": {"cpus": 2, "gpus": 1}},
        "serving": {"database": DATABASE},
    }
    for name, section in sections.items():
        merged[name] = {**merged.get(name, {}), **section} if section is not None else None
    return Config.model_validate(merged)


def server(**keys: Any) -> ServeConfig:
    return ServeConfig.model_validate(
        {"model": {"path": "org/model"}, "reward": None, "serving": {"database": DATABASE}, **keys}
    )


def one(manifests: list[Object], kind: str) -> Object:
    (found,) = (m for m in manifests if m["kind"] == kind)
    return found


def cluster_of(manifests: list[Object]) -> Object:
    last = manifests[-1]["spec"]
    return next((last[key] for key in ("rayClusterSpec", "rayClusterConfig") if key in last), last)


def groups(manifests: list[Object]) -> dict[str, tuple[Any, ...]]:
    found = {}
    for group in cluster_of(manifests)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = int(limits.get("nvidia.com/gpu", 0))
        found[group["groupName"]] = (int(limits["cpu"]), gpus, group["minReplicas"], group["maxReplicas"])
    return found


def pods(manifests: list[Object]) -> Iterator[Object]:
    cluster = cluster_of(manifests)
    yield cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]["spec"]
    if "submitterPodTemplate" in manifests[-1]["spec"]:
        yield manifests[-1]["spec"]["submitterPodTemplate"]["spec"]


def cases() -> list[Any]:
    everything = {
        "storage": {"uri": "s3://bucket/mmrl"},
        "pull_secrets": ["registry"],
        "env_secrets": ["mmrl-env"],
        "service_account": "mmrl",
        "client_namespaces": ["web"],
        "head": {"node_selector": {"pool": "cpu"}, "tolerations": [{"key": "a", "operator": "Equal", "value": "b"}]},
        "learner": {"actors_per_pod": 2, "tolerations": [{"key": "spot", "effect": "NoSchedule"}]},
        "redis": None,
    }
    live = {"live_policy": True, "policy": {"resources": {"cpus": 1, "gpus": 1}, "max_replicas": 2}}
    return [
        pytest.param(run(), "rayjob", id="job"),
        pytest.param(run(), "raycluster", id="cluster"),
        pytest.param(run(), "rayservice", id="service-of-a-run"),
        pytest.param(server(), "rayservice", id="service"),
        pytest.param(run(deploy=everything), "rayjob", id="job-with-everything"),
        pytest.param(run(deploy=everything), "rayservice", id="service-with-everything"),
        pytest.param(run(serving=live), "rayjob", id="job-with-live-policy"),
        pytest.param(run(deploy={"storage": {"create": False, "storage_class": "nfs"}}), "raycluster", id="no-claim"),
    ]


@pytest.mark.parametrize(("cfg", "kind"), cases())
def test_kuberay_takes_what_is_rendered(cfg: Config | ServeConfig, kind: Any) -> None:
    manifests = list(yaml.safe_load_all(dump(render(cfg, kind))))
    assert manifests == render(cfg, kind)  # nothing is lost or becomes another type on its way through YAML
    assert manifests[-1]["kind"].lower() == kind
    assert problems(manifests[-1]) == []
    if kind == "rayservice":
        check_serve_config(yaml.safe_load(manifests[-1]["spec"]["serveConfigV2"]))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_manifests_are_what_their_command_renders(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    command = text.splitlines()[0].removeprefix("# ")
    done = mmrl(*shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    assert done.stdout == text, f"out of date: {command} -o {path.relative_to(ROOT)}"
    last = list(yaml.safe_load_all(text))[-1]
    assert problems(last) == []
    if "serveConfigV2" in last["spec"]:
        check_serve_config(yaml.safe_load(last["spec"]["serveConfigV2"]))


ON_ONE_MACHINE = {"flickr8k", "distill", "dpo", "ilql", "reward-model"}
"""Configs that pods cannot run as they are: a store of preferences in a file; rollouts and policy of a run made on
this machine; a model that a program beside it makes; a command of its own, without Ray."""


def test_every_kind_is_shipped_and_every_config_of_a_cluster_has_one() -> None:
    kinds = {p.stem.rpartition("-")[2] for p in SHIPPED}
    assert kinds == {"rayjob", "rayservice", "raycluster"}
    assert {p.stem for p in (ROOT / "configs").glob("*.yaml")} - ON_ONE_MACHINE <= {
        p.stem.rpartition("-")[0] for p in SHIPPED
    }


# -- the strict check itself -------------------------------------------------------------------------------------------


def _head(job: Object) -> Object:
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda j: j["spec"].update(entryPoint="x"), "entryPoint"),
        (lambda j: j["spec"]["rayClusterSpec"].update(authOption={}), "authOption"),
        (lambda j: j["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens"), "tokens"),
        (lambda j: _head(j)["template"]["spec"]["containers"][0].update(livenessprobe={}), "livenessprobe"),
        (lambda j: _head(j)["template"]["spec"]["securityContext"].update(runAsNonRoot="yes"), "yes"),
        (lambda j: _head(j).pop("template"), "template"),
        (lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas="1"), "minReplicas"),
    ],
)
def test_the_check_sees_mistakes(change: Callable[[Object], Any], message: str) -> None:
    job = copy.deepcopy(one(render(run(), "rayjob"), "RayJob"))
    change(job)
    assert any(message in problem for problem in problems(job))


def test_strict_leaves_free_maps_and_defaults_alone() -> None:
    schema = {
        "type": "object",
        "required": ["a", "b"],
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "integer", "default": 1},
            "free": {"type": "object", "additionalProperties": {"type": "object", "properties": {"x": {}}}},
            "any": {"type": "object", "properties": {"x": {}}, "x-kubernetes-preserve-unknown-fields": True},
        },
    }
    closed = strict(schema)
    assert closed["required"] == ["a"]
    assert closed["additionalProperties"] is False
    assert closed["properties"]["free"]["additionalProperties"]["additionalProperties"] is False
    assert "additionalProperties" not in closed["properties"]["any"]
    assert "additionalProperties" not in schema


# -- what they say -----------------------------------------------------------------------------------------------------


def test_groups_follow_the_config() -> None:
    assert groups(render(run(), "rayjob")) == {"learner": (4, 1, 2, 2), "rollout": (2, 1, 3, 3)}
    assert groups(render(run(), "raycluster")) == {"learner": (4, 1, 0, 2), "rollout": (2, 1, 0, 3)}
    deploy = {"learner": {"actors_per_pod": 2}, "rollout": {"min_replicas": 1, "max_replicas": 9}}
    assert groups(render(run(deploy=deploy), "rayjob")) == {"learner": (8, 2, 1, 1), "rollout": (2, 1, 1, 9)}
    shared = {"placement": "shared", "learner": {"cpus": 2, "gpus": 0.5}, "rollout": {"cpus": 1.5, "gpus": 0.5}}
    assert groups(render(run(resources=shared), "rayjob")) == {"shared": (4, 1, 3, 3)}
    cpu = {"placement": "shared", "learner": {"cpus": 2}, "rollout": {"cpus": 0.5}}
    assert groups(render(run(resources=cpu), "rayjob")) == {"learner": (2, 0, 2, 2), "rollout": (1, 0, 3, 3)}
    reward = {**run().resources.model_dump(), "reward": {"cpus": 1.5}}
    assert groups(render(run(resources=reward), "rayjob"))["serving"] == (2, 0, 1, 1)
    policy = {"policy": {"resources": {"cpus": 3, "gpus": 1}, "min_replicas": 2, "max_replicas": 4}}
    serving = {"database": DATABASE, **policy}
    assert groups(render(server(serving=serving), "rayservice")) == {"serving": (3, 1, 2, 4)}


def test_each_actor_asks_for_the_group_that_is_made_for_it() -> None:
    manifests = render(run(), "rayjob")
    inside = parse_config(one(manifests, "ConfigMap")["data"]["config.yaml"], "config.yaml")
    labels = {g["groupName"]: g["labels"] for g in cluster_of(manifests)["workerGroupSpecs"]}
    assert inside.resources.learner.node_labels == labels["learner"]
    assert inside.resources.rollout.node_labels == labels["rollout"]
    assert labels["learner"] != labels["rollout"]


def test_the_job_finds_its_config_and_its_storage() -> None:
    manifests = render(run(model={"path": "./models/base"}), "rayjob")
    config, job = one(manifests, "ConfigMap"), one(manifests, "RayJob")
    inside = parse_config(config["data"]["config.yaml"], "config.yaml")
    assert (inside.run.root, inside.data.train) == ("/mnt/mmrl/runs", "/mnt/mmrl/data/train")
    assert inside.model.path == "/mnt/mmrl/models/base"
    head = _head(job)["template"]["spec"]
    mounts = {m["name"]: m["mountPath"] for m in head["containers"][0]["volumeMounts"]}
    sources = {v["name"]: v for v in head["volumes"]}
    claim = one(manifests, "PersistentVolumeClaim")
    assert sources["storage"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert sources["config"]["configMap"]["name"] == config["metadata"]["name"]
    assert mounts["storage"] == "/mnt/mmrl"
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["mmrl", "train", f"{mounts['config']}/config.yaml"]
    assert words[3:] == ["--resume-or-start", "--address", "auto"]


def test_on_an_object_store_there_is_no_volume() -> None:
    cfg = run(deploy={"storage": {"uri": "s3://bucket/mmrl/"}}, data={"eval": "gs://other/eval"})
    manifests = render(cfg, "rayjob")
    inside = parse_config(one(manifests, "ConfigMap")["data"]["config.yaml"], "config.yaml")
    assert (inside.run.root, inside.data.train) == ("s3://bucket/mmrl/runs", "s3://bucket/mmrl/data/train")
    assert inside.data.eval == "gs://other/eval"
    assert not any("persistentVolumeClaim" in v for pod in pods(manifests) for v in pod.get("volumes", ()))
    assert [m["kind"] for m in manifests] == ["ConfigMap", "NetworkPolicy", "RayJob"]


@pytest.mark.parametrize("kind", ["rayjob", "raycluster", "rayservice"])
def test_who_may_do_what(kind: Any) -> None:
    manifests = render(run(), kind)
    cluster = cluster_of(manifests)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "mmrl-ray-token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert (cluster["headGroupSpec"]["serviceType"], cluster["headGroupSpec"]["enableIngress"]) == ("ClusterIP", False)
    assert ("gcsFaultToleranceOptions" in cluster) == (kind != "rayjob")
    for pod in pods(manifests):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert "RAY_AUTH_TOKEN" not in str(container.get("env"))
        if container["name"] != "ray-job-submitter":
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
    policy = one(manifests, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    selected = policy["podSelector"]["matchLabels"].items()
    templates = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
    assert all(selected <= t["metadata"]["labels"].items() for t in templates)
    own, operator, clients = policy["ingress"]
    assert own["from"][0]["podSelector"] == policy["podSelector"]
    assert {p["port"] for p in clients["ports"]} == {8000}
    assert {p["port"] for p in operator["ports"]} == {8000, 8265}
    names = {operator["from"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]}
    assert names == {"kuberay-operator"}


def test_a_gateway_is_reached_at_its_pods() -> None:
    manifests = render(server(serving={"database": DATABASE, "port": 8123}), "rayservice")
    config = yaml.safe_load(manifests[-1]["spec"]["serveConfigV2"])
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8123}
    (group,) = cluster_of(manifests)["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8123}
    assert {"name": "serve", "containerPort": 8123} in container["ports"]
    assert "deploy" not in config["applications"][0]["args"]["config"]  # a new image alone is no new application


@pytest.mark.parametrize(
    ("cfg", "kind", "message"),
    [
        (run(data={"train": "/home/me/data"}), "rayjob", "data.train=/home/me/data is not on the volume at /mnt/mmrl"),
        (run(data={"train": "../data"}), "rayjob", "data.train=../data is not on the volume"),
        (run(run={"name": "demo", "root": "~/runs"}), "rayjob", "run.root=~/runs is not on the volume"),
        (run(data={"scenes": {}}, deploy={"storage": {"uri": "s3://b"}}), "rayjob", "data.scenes: makes files"),
        (run(sft={"steps": 20}), "rayservice", "the base of demo is made by the run itself"),
        (run(serving={"database": None}), "rayservice", "serving.database: gateways on several pods"),
        (run(serving={"database": None, "live_policy": True}), "rayjob", "serving.database: gateways on several"),
        (run(run={"name": "x" * 60}), "rayjob", "deploy.name=xxxx"),
        (run(run={"name": "3b"}), "rayjob", "deploy.name=3b"),
        (server(), "rayjob", "--kind rayjob is for a run"),
        (server(reward={}), "rayservice", "statistics: the reward's parts need them"),
    ],
)
def test_what_cannot_work_is_refused(cfg: Config | ServeConfig, kind: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        render(cfg, kind)
    assert message in str(error.value)


def test_the_command_writes_a_file_and_tells_configs_apart(tmp_path: Path) -> None:
    out = tmp_path / "k8s" / "job.yaml"
    done = mmrl("deploy", "render", ROOT / "configs" / "quickstart.yaml", "--kind", "rayjob", "-o", out)
    assert (done.exit_code, done.stdout) == (0, f"{out}\n")
    assert [m["kind"] for m in yaml.safe_load_all(out.read_text())][-1] == "RayJob"
    refused = mmrl("deploy", "render", ROOT / "configs" / "serve.yaml", "--kind", "raycluster")
    assert refused.exit_code == 2
    assert isinstance(load_any_config(ROOT / "configs" / "serve.yaml"), ServeConfig)
    assert isinstance(load_any_config(ROOT / "configs" / "quickstart.yaml"), Config)
