"""The OpenAPI document: complete, true to what is answered, and nothing made from it breaks the gateway."""

from __future__ import annotations

import json
from typing import Any

import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from mmrl_ray.serving.app import GatewayDeps, make_app
from tests.support.fake_jobs import SETTINGS, FakeJobs
from tests.support.fake_services import FakePolicy, FakeReward

APP = make_app(GatewayDeps(FakePolicy(), FakeReward(), None, SETTINGS, insecure=True, jobs=FakeJobs()))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP, headers={"host": "localhost"})


@SCHEMA.parametrize()
@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_nothing_made_from_the_document_breaks_the_gateway(case: schemathesis.Case) -> None:
    case.call_and_validate(
        headers={"host": "localhost"},
        checks=[not_a_server_error, content_type_conformance, response_schema_conformance],
    )


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_every_reference_leads_somewhere() -> None:
    document = TestClient(APP, base_url="http://localhost").get("/openapi.json").json()
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document) <= known
    assert {"ChatRequest", "CaptionRequest", "RewardRequest", "ScoreRequest"} <= set(document["components"]["schemas"])
    assert document["security"] == [{"key": []}]
    assert "HTTPValidationError" not in json.dumps(document), "errors have one shape here"


def test_every_path_that_takes_a_body_says_so() -> None:
    for path, methods in APP.openapi()["paths"].items():
        for method, operation in methods.items():
            assert ("requestBody" in operation) == (method in ("post", "put")), path
            assert "default" in operation["responses"], path
