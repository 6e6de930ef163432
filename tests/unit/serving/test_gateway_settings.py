"""`serving:` and a whole config of `mmrl serve`: what is refused, and that every word of it is described."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from mmrl_ray.config.serving import (
    DeploymentSection,
    LimitsSection,
    PolicyDeployment,
    RemoteImagesSection,
    ServeConfig,
    ServingSection,
)

MODEL = {"path": "builtin:tiny-llava"}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (DeploymentSection, {"min_replicas": 3, "max_replicas": 2}, "min_replicas=3 is above max_replicas=2"),
        (DeploymentSection, {"target_ongoing_requests": 9.0, "max_ongoing_requests": 8}, "would never be added"),
        (DeploymentSection, {"min_replicas": 0}, "min_replicas"),
        (LimitsSection, {"max_tokens": 10}, "default_max_tokens=64 is above max_tokens=10"),
        (RemoteImagesSection, {"enabled": True}, "needs allowed_domains"),
        (RemoteImagesSection, {"allowed_domains": ["https://example.com"]}, "are no lower-case host names"),
        (RemoteImagesSection, {"allowed_domains": ["*"]}, "are no lower-case host names"),
        (RemoteImagesSection, {"allowed_domains": ["a.*.com"]}, "are no lower-case host names"),
        (ServingSection, {"port": 0}, "port"),
        (ServingSection, {"model_id": "../x"}, "model_id"),
        (ServingSection, {"request_timeout_s": float("inf")}, "request_timeout_s"),
        (ServingSection, {"policy": {"max_rows": 4}}, "policy.max_rows=4 is below limits.max_n=16"),
        (ServeConfig, {"model": MODEL, "adapters": {"../x": "runs/a"}}, "an id has up to 64"),
        (ServeConfig, {"model": MODEL, "adapters": {"x\n": "runs/a"}}, "an id has up to 64"),
        (
            ServeConfig,
            {"model": MODEL, "adapters": {"a": "runs/a"}, "serving": {"model_id": "a"}},
            "'a' is serving.model_id already",
        ),
    ],
)
def test_what_does_not_fit_is_refused(section: type[BaseModel], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section.model_validate(values)


def test_what_fits() -> None:
    remote = RemoteImagesSection(enabled=True, allowed_domains=["images.example.com", "*.example.org", "93.184.215.14"])
    assert remote.enabled
    written = ServeConfig.model_validate({"model": MODEL, "serving": {"policy": {"max_replicas": 2}}})
    assert written.serving.policy == PolicyDeployment(max_replicas=2), "the rest stays the policy's own"
    assert written.serving.policy.resources.cpus == 1
    assert not written.serving.remote_images.enabled
    assert written.serving.host == "127.0.0.1"
    assert ServeConfig.model_validate(written.model_dump(mode="json")) == written


def test_every_key_is_described() -> None:
    for name, section in ServeConfig.model_json_schema()["$defs"].items():
        for key, value in section.get("properties", {}).items():
            assert value.get("description") or key == "kind", f"{name}.{key}"
