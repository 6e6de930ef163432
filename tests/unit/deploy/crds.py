"""KubeRay's resource definitions as strict JSON Schemas: a key that they do not know is an error."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[3]
CRDS = ROOT.parent / "shared" / "kuberay-crds"


def problems(manifest: dict[str, Any]) -> list[str]:
    """What KubeRay's definition of its kind refuses in an object; skips where the definitions are not there."""
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's resource definitions are not at {CRDS}: the manifests are NOT validated")
    validator = _validator(f"{manifest['kind'].lower()}s")
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@cache
def _validator(plural: str) -> jsonschema.Draft202012Validator:
    text = (CRDS / f"ray.io_{plural}.yaml").read_text()
    definition = yaml.load(text, Loader=yaml.CSafeLoader)
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, which refuses unknown keys and wants no key that has a default."""
    out = copy.deepcopy(schema)
    _close(out)
    return out


def _close(node: Any) -> None:
    if isinstance(node, list):
        for each in node:
            _close(each)
    if not isinstance(node, dict):
        return
    properties = node.get("properties")
    if isinstance(properties, dict):
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        required = [key for key in node.get("required", ()) if "default" not in properties.get(key, {})]
        node.pop("required", None)
        if required:
            node["required"] = required
        for each in properties.values():
            _close(each)
    for key in ("items", "additionalProperties", "allOf", "anyOf", "oneOf"):
        _close(node.get(key))
