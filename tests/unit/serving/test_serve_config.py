"""The Serve config file: what Ray's own schema lets through is refused here, with the place and the key."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.config.serving import ServeConfig, ServingSection
from mmrl_ray.errors import ConfigError
from mmrl_ray.serving.launch import check_serve_config, serve_config

CFG = ServeConfig(
    model=ModelSection(path="base"),
    serving=ServingSection.model_validate({"port": 8123, "policy": {"min_replicas": 2, "max_replicas": 3}}),
)
POLICY = "applications.0.deployments.1"


def test_it_says_what_the_config_says() -> None:
    config = serve_config(CFG)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8123}
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert ServeConfig.model_validate(application.args["config"]) == CFG
    policy = next(each for each in config["applications"][0]["deployments"] if each["name"] == "policy")
    assert policy["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 3, "target_ongoing_requests": 16.0}


def test_without_a_reward_there_is_no_reward_deployment() -> None:
    (application,) = serve_config(CFG.model_copy(update={"reward": None}))["applications"]
    assert [each["name"] for each in application["deployments"]] == ["gateway", "policy"]


def _policy(config: dict[str, Any]) -> dict[str, Any]:
    return config["applications"][0]["deployments"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(http_option={}), "http_option: unknown key; did you mean http_options"),
        (lambda c: c["http_options"].update(prt=1), "http_options.prt: unknown key; did you mean port"),
        (lambda c: c["applications"][0].update(nme="x"), "applications.0.nme: unknown key; did you mean name"),
        (lambda c: _policy(c).update(max_ongoing_request=1), f"{POLICY}.max_ongoing_request: unknown key"),
        (lambda c: _policy(c)["autoscaling_config"].update(min_replica=1), "autoscaling_config.min_replica: unknown"),
        (lambda c: _policy(c)["ray_actor_options"].update(num_cpu=1), "ray_actor_options.num_cpu: unknown key"),
        (lambda c: _policy(c)["autoscaling_config"].update(min_replicas=4), r"max_replicas \(3\) must be greater"),
        (lambda c: c["applications"][0]["args"]["config"]["serving"].update(prt=1), "config.serving.prt"),
        (lambda c: c.update(applications=None), "applications"),
    ],
)
def test_mistakes_are_refused_with_their_place(change: Callable[[dict[str, Any]], None], message: str) -> None:
    config = copy.deepcopy(serve_config(CFG))
    change(config)
    with pytest.raises(ConfigError, match=message):
        check_serve_config(config)


@pytest.mark.parametrize(
    ("serving", "more", "message"),
    [
        ({"policy": {"engine": {"kind": "vllm"}}}, {"agent": "runs/dqn"}, "cannot answer as an agent"),
        ({"policy": {"engine": {"kind": "vllm"}}, "max_rank": 1024}, {}, "max_rank=1024 is above 512"),
        ({"policy": {"engine": {"kind": "vllm", "args": {"logprobs_mode": "x"}}}}, {}, "not yours to choose"),
        ({"policy": {"engine": {"dtype": "float32"}}}, {}, "keys of engine.kind=vllm"),
        (
            {"policy": {"engine": {"kind": "vllm", "tensor_parallel_size": 4}, "resources": {"gpus": 2}}},
            {},
            "tensor_parallel_size=4 wants as many GPUs a replica, and resources.gpus=2",
        ),
    ],
)
def test_what_the_engine_of_a_server_cannot_be_is_refused(
    serving: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ServeConfig.model_validate({"model": {"path": "base"}, "serving": serving, **more})
