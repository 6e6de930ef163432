"""Delivery to a stand-in for the Hub, by the program itself: what arrives, and what is never said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmrl_ray.errors import ConfigError, ExportError
from mmrl_ray.export.hub import Delivery
from tests.support.hub import Hub, serving
from tests.unit.export.conftest import MakeWorld

TOKEN = "hf_verysecretverysecretverysecret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Known to this process, too, whose `huggingface_hub` has read its environment already."""
    from huggingface_hub import constants

    with serving(Hub(TOKEN)) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    (made / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Mine\n")
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights")
    return made


def mmrl(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """As a user runs it, since `huggingface_hub` reads its environment when it is imported."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "mmrl_ray.cli", *map(str, arguments)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_an_export_is_pushed_to_a_private_repository(hub: Hub, make_world: MakeWorld, tmp_path: Path) -> None:
    world, out = make_world(), tmp_path / "out"
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_DEBUG": "1"}
    asked = ("export", world.target, "--out", out, "--merged", "--push-to-hub", "mine", "--private")
    without = mmrl(*asked, **home)
    assert without.returncode == 2
    assert "needs a token of the Hub" in without.stderr
    assert "hf auth login" in without.stderr
    assert (hub.requests, out.exists()) == ([], False)
    done = mmrl(*asked, HF_TOKEN=TOKEN, **home)
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.endpoint}/me/mine" in done.stderr
    assert hub.private == {"me/mine": True}
    assert hub.files["me/mine"] == {file.name: file.read_bytes() for file in out.iterdir()}
    assert sum(" /api/models/me/mine/commit/" in request for request in hub.requests) == 1
    said = done.stdout + done.stderr
    assert TOKEN not in said
    assert not [file for file in out.iterdir() if TOKEN.encode() in file.read_bytes()]


def test_what_an_earlier_export_left_goes_by_the_same_commit(hub: Hub, folder: Path) -> None:
    hub.files["me/mine"] = {
        "adapter_config.json": b"{}",
        "old.safetensors": b"",
        "picture.png": b"",
        "config.json": b"",
    }
    hub.private["me/mine"] = False
    Delivery.prepared("mine", private=False).send(folder)
    assert sorted(hub.files["me/mine"]) == ["README.md", "config.json", "model.safetensors", "picture.png"]


def test_nothing_private_goes_to_a_public_repository(hub: Hub, folder: Path) -> None:
    hub.files["me/mine"], hub.private["me/mine"] = {}, False
    with pytest.raises(ExportError, match=r"me/mine is there already, and public: make it private"):
        Delivery.prepared("me/mine", private=True).send(folder)
    assert hub.files == {"me/mine": {}}


def test_what_the_hub_refuses_is_told_without_the_token(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="NAME or OWNER/NAME"):
        Delivery.prepared("a/b/c", private=False)
    hub.refuses = ("/commit/main",)
    with pytest.raises(ExportError, match=rf"mine did not take the export: 403 .*`hf upload mine {folder}`") as raised:
        Delivery.prepared("mine", private=False).send(folder)
    assert TOKEN not in str(raised.value)
    assert hub.files == {"me/mine": {}}
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ConfigError, match="refuses the token"):
        Delivery.prepared("mine", private=False)
