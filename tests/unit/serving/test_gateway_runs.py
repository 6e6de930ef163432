"""Runs at the gateway: for admins alone, by name alone, and never more than their folder says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mmrl_ray.config.serving import ServingSection
from mmrl_ray.run_records.control_files import ScaleAnswer, pending_requests, put_answer, read_request, write_status
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.serving.app import GatewayDeps, make_app
from mmrl_ray.serving.keys import KeyStore
from mmrl_ray.serving.routes import training
from tests.support.fake_services import FakePolicy, FakeReward

PUT = {"workers": 3}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    store = KeyStore(f"sqlite:///{tmp_path}/keys.db")
    yield store
    store.close()


def client(store: KeyStore, root: Path | None, role: Any = "admin") -> TestClient:
    settings = ServingSection(runs_root=None if root is None else str(root))
    key, _ = store.create(role, [role])
    app = make_app(GatewayDeps(FakePolicy(), FakeReward(), store, settings))
    return TestClient(app, raise_server_exceptions=False, headers={"authorization": f"Bearer {key}"})


@pytest.fixture
def admin(store: KeyStore, tmp_path: Path) -> TestClient:
    return client(store, tmp_path / "runs")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "runs", "mine")
    write_status(run, "running", 15.0, {"step": 4, "pool": {"target": 1}})
    return run


def answering(run: RunDir, answer: ScaleAnswer) -> threading.Thread:
    """A run that answers the next request, and keeps what it was."""

    def work() -> None:
        deadline = time.monotonic() + 20
        while not (names := pending_requests(run)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert read_request(run, names[0]).workers == 3
        put_answer(run, names[0], answer)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_an_admin_sees_how_a_run_stands(admin: TestClient, run: RunDir) -> None:
    status = admin.get("/v1/runs/mine").json()
    assert (status["run"], status["state"], status["alive"], status["step"]) == ("mine", "running", True, 4)


def test_an_admin_scales_a_run(admin: TestClient, run: RunDir) -> None:
    thread = answering(run, ScaleAnswer(accepted=True, message="1 → 3 rollout workers", target=3, number=1))
    answer = admin.put("/v1/runs/mine/rollout_workers", json=PUT)
    thread.join(20)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"id": "mine", "workers": 3, "message": "1 → 3 rollout workers"}
    thread = answering(run, ScaleAnswer(accepted=False, message="3 rollout workers are more than the most"))
    refused = admin.put("/v1/runs/mine/rollout_workers", json=PUT)
    thread.join(20)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "workers: 3 rollout workers are more than the most"
    assert run.list("control") == []


def test_nobody_else_does(store: KeyStore, run: RunDir, tmp_path: Path) -> None:
    for role in ("infer", "feedback"):
        other = client(store, tmp_path / "runs", role)
        for answer in (other.get("/v1/runs/mine"), other.put("/v1/runs/mine/rollout_workers", json=PUT)):
            assert answer.status_code == 403
            assert "takes admin" in answer.json()["error"]["message"]
    assert run.list("control") == []


@pytest.mark.parametrize(
    "name",
    ["none", "..", "%2e%2e", "..%2Fmine", "%2Fetc", ".hidden", "a" * 65, "mine%00", "linked", "file", "s3:%2F%2Fx"],
)
def test_a_run_is_a_name_and_never_a_path(admin: TestClient, run: RunDir, tmp_path: Path, name: str) -> None:
    elsewhere = RunDir.create(tmp_path, "elsewhere")
    write_status(elsewhere, "running", 15.0)
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "file").write_text("no folder")
    for answer in (admin.get(f"/v1/runs/{name}"), admin.put(f"/v1/runs/{name}/rollout_workers", json=PUT)):
        assert answer.status_code == 404, answer.text
        assert str(tmp_path) not in answer.text
    assert elsewhere.list("control") == []


def test_without_a_folder_of_runs_there_are_none(store: KeyStore, run: RunDir) -> None:
    answer = client(store, None).get("/v1/runs/mine")
    assert answer.status_code == 404
    assert "serving.runs_root" in answer.json()["error"]["message"]


@pytest.mark.parametrize("state", ["finished", "starting"])
def test_a_run_that_cannot_be_scaled_is_a_conflict(
    admin: TestClient, run: RunDir, monkeypatch: pytest.MonkeyPatch, state: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(training, "_ANSWER_S", 0.3)
    write_status(run, state, 15.0)
    answer = admin.put("/v1/runs/mine/rollout_workers", json=PUT)
    assert answer.status_code == 409
    error = answer.json()["error"]
    assert error["code"] == "run_not_in_progress"
    assert error["message"].startswith("mine")
    assert str(tmp_path) not in answer.text
    assert run.list("control") == []


@pytest.mark.parametrize("body", [{}, {"workers": 0}, {"workers": "3"}, {"workers": 1.5}, {"workers": 3, "x": 1}, [3]])
def test_bodies_that_are_none(admin: TestClient, run: RunDir, body: Any) -> None:
    assert admin.put("/v1/runs/mine/rollout_workers", json=body).status_code == 400
    assert run.list("control") == []
