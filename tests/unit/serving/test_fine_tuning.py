"""Fine-tuning jobs over HTTP by the official OpenAI client; who may, what may be asked, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from mmrl_ray.config.serving import FineTuningSection, ServingSection
from mmrl_ray.errors import ConfigError, JobError, JobServerError, JobSetupError, OverloadedError
from mmrl_ray.serving.app import GatewayDeps, make_app
from mmrl_ray.serving.fine_tuning_types import CheckpointCard, EventCard
from mmrl_ray.serving.job_service import compose, recipe_configs, run_name
from mmrl_ray.serving.keys import KeyStore
from mmrl_ray.serving.protocols import ResultFile, TuningOrder
from tests.support.fake_jobs import RECIPE, SETTINGS, FakeJobs
from tests.support.fake_services import FakePolicy, running_gateway

ASK = {"model": "smol", "training_file": "coco"}


class Server:
    def __init__(self, url: str, store: KeyStore, jobs: FakeJobs) -> None:
        self.url, self.store, self.fakes = f"{url}/v1", store, jobs
        self.jobs = self.connect("admin").fine_tuning.jobs

    def connect(self, role: Any) -> openai.OpenAI:
        key, _ = self.store.create(role, [role])
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0)

    def create(self, **options: Any) -> Any:
        return self.jobs.create(**{**ASK, **options})


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    jobs = FakeJobs()
    store = KeyStore(f"sqlite:///{tmp_path_factory.mktemp('keys')}/keys.db")
    with running_gateway(make_app(GatewayDeps(FakePolicy(), None, store, SETTINGS, jobs=jobs))) as url:
        yield Server(url, store, jobs)
    store.close()


@pytest.fixture
def server(running: Server) -> Server:
    running.fakes.known, running.fakes.told, running.fakes.kept, running.fakes.error = {}, {}, {}, None
    return running


def test_a_job_from_its_order_to_its_result(server: Server) -> None:
    hyperparameters: Any = {"n_epochs": 2, "batch_size": 16, "learning_rate_multiplier": 0.5}
    method: Any = {"type": "reinforcement", "reinforcement": {"hyperparameters": hyperparameters}}
    job = server.create(method=method, seed=7, suffix="mine", validation_file="held-out", metadata={"who": "me"})
    order = TuningOrder("smol", "coco", "held-out", "mine", 7, 2, None, 16, 0.5, {"who": "me"})
    assert server.fakes.known[job.id].order == order
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "queued", "smol", 7)
    assert (job.training_file, job.validation_file, job.metadata) == ("coco", "held-out", {"who": "me"})
    assert (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.error) == (None, None, None, None)
    assert job.method.type == "reinforcement"
    assert job.hyperparameters.n_epochs == job.method.reinforcement.hyperparameters.n_epochs == 2

    server.fakes.change(
        job.id, status="succeeded", finished_at=1_700_000_900, trained_tokens=1234, result_files=("r/a",)
    )
    done = server.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", "smol-0", 1234)
    assert (done.created_at, done.finished_at, done.result_files) == (1_700_000_000, 1_700_000_900, ["r/a"])

    server.fakes.change(job.id, status="failed", error="no such model")
    failed = server.jobs.retrieve(job.id)
    assert failed.error is not None
    assert (failed.error.code, failed.error.message, failed.fine_tuned_model) == ("job_failed", "no such model", None)
    assert server.jobs.cancel(server.create().id).status == "cancelled"


def test_what_is_left_to_the_recipe_is_auto(server: Server) -> None:
    job = server.create(hyperparameters={"n_epochs": "auto", "steps": 9})
    order = server.fakes.known[job.id].order
    assert (order.epochs, order.steps, order.batch_size, order.lr_multiplier) == (None, 9, None, None)
    assert job.hyperparameters.model_dump() == {
        "n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto", "steps": 9,
    }  # fmt: skip
    assert 0 <= job.seed < 2**31
    assert len({server.create().seed for _ in range(3)}) > 1, "drawn where none is given"


def test_pages_go_on_behind_the_last_item(server: Server) -> None:
    ids = [server.create(metadata={"odd": str(number % 2)}).id for number in range(5)][::-1]
    page = server.jobs.list(limit=2)
    assert [job.id for job in page.data] == ids[:2]
    assert page.has_more
    assert [job.id for job in server.jobs.list(limit=2)] == ids, "the client turns the pages itself"
    assert not server.jobs.list(limit=5).has_more
    assert [job.id for job in server.jobs.list(metadata={"odd": "1"})] == [ids[1], ids[3]]
    for wrong in ({"after": "ftjob-none"}, {"limit": 0}, {"limit": 101}, {"limit": "many"}):
        with pytest.raises(openai.BadRequestError) as error:
            server.jobs.list(**wrong)  # type: ignore[arg-type]
        assert error.value.param == next(iter(wrong))


def test_events_and_checkpoints(server: Server) -> None:
    id = server.create().id
    server.fakes.told[id] = [
        EventCard(
            id=f"e{number}",
            created_at=1_700_000_000 + number,
            level="info",
            message=f"Step {number}",
            type="metrics",
            data={"step": number, "train_loss": 0.5},
        )
        for number in (3, 2, 1)
    ]
    server.fakes.kept[id] = [
        CheckpointCard(
            id="c",
            created_at=1_700_000_004,
            fine_tuning_job_id=id,
            fine_tuned_model_checkpoint="smol-0:ckpt-step-4",
            step_number=4,
            metrics={"train_loss": 0.25},
        )
    ]
    events = server.jobs.list_events(id, limit=2)
    assert [event.id for event in events.data] == ["e3", "e2"]
    assert [event.id for event in server.jobs.list_events(id, limit=2)] == ["e3", "e2", "e1"]
    first = events.data[0]
    assert (first.object, first.type, first.level, first.data) == (
        "fine_tuning.job.event", "metrics", "info", {"step": 3, "train_loss": 0.5},
    )  # fmt: skip
    (checkpoint,) = server.jobs.checkpoints.list(id)
    assert checkpoint.fine_tuned_model_checkpoint == "smol-0:ckpt-step-4"
    assert (checkpoint.step_number, checkpoint.metrics.train_loss) == (4, 0.25)
    assert checkpoint.fine_tuning_job_id == id
    assert list(server.jobs.checkpoints.list(server.create().id)) == []


def test_result_files_are_fetched(server: Server) -> None:
    server.fakes.files = {"file-0-report.html": ResultFile("report.html", 1_700_000_000, b"<script>")}
    files = server.connect("admin").files
    card = files.retrieve("file-0-report.html")
    assert (card.id, card.object, card.bytes, card.filename) == ("file-0-report.html", "file", 8, "report.html")
    assert (card.created_at, card.purpose, card.status) == (1_700_000_000, "fine-tune-results", "processed")
    held = files.content("file-0-report.html")
    assert held.read() == b"<script>"
    assert "text/html" not in held.response.headers["content-type"], "a report must not run as a page of the server"
    for call in (files.retrieve, files.content):
        with pytest.raises(openai.NotFoundError) as error:
            call("file-1-report.html")
        assert error.value.param == "file_id"
        with pytest.raises(openai.PermissionDeniedError):
            getattr(server.connect("infer").files, call.__name__)("file-0-report.html")


def test_pause_and_resume_are_not_supported(server: Server) -> None:
    id = server.create().id
    for call in (server.jobs.pause, server.jobs.resume):
        with pytest.raises(openai.BadRequestError, match=f"not supported here.*mmrl jobs resume {id}") as error:
            call(id)
        assert error.value.code == "not_supported"
        with pytest.raises(openai.NotFoundError):
            call("ftjob-9")


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": "gpt-4o"}, "model", "may not be used here; there is big/vlm, smol"),
        ({"model": "hub/base"}, "model", "may not be used here"),
        ({"training_file": "s3://data/coco"}, "training_file", "may not be used here; there is coco, held-out"),
        ({"validation_file": "../x"}, "validation_file", "may not be used here"),
        ({"suffix": "../x"}, "suffix", "pattern"),
        ({"method": {"type": "dpo"}}, "method.type", "'reinforcement'"),
        (
            {"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}},
            "method.reinforcement.grader",
            "send no grader",
        ),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size", "must be at least 1, not 0"),
        ({"hyperparameters": {"n_epochs": 1, "steps": 1}}, "hyperparameters", "not both"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 0}},
            "hyperparameters.learning_rate_multiplier",
            "must be above 0",
        ),
        ({"hyperparameters": {"lora_r": 64}}, "hyperparameters.lora_r", "unknown"),
        ({"extra_body": {"rollout": {"workers": 64}}}, "rollout", "unknown"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations", "not served here"),
        ({"metadata": {"x" * 65: "y"}}, None, "at most 64"),
    ],
)
def test_what_is_not_allowed_is_400_and_begins_nothing(
    server: Server, change: dict[str, Any], param: str | None, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        server.create(**change)
    assert message in str(error.value)
    if param is not None:
        assert error.value.param == param
    assert server.fakes.known == {}


def test_only_an_admin_may(server: Server) -> None:
    id = server.create().id
    for role in ("infer", "feedback"):
        jobs = server.connect(role).fine_tuning.jobs
        one = (jobs.retrieve, jobs.cancel, jobs.list_events, jobs.checkpoints.list)
        for call in (partial(jobs.create, **ASK), jobs.list, *(partial(each, id) for each in one)):
            with pytest.raises(openai.PermissionDeniedError):
                call()
    assert len(server.fakes.known) == 1
    assert server.fakes.known[id].status == "queued"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OverloadedError("4 jobs are under way"), openai.InternalServerError, "4 jobs are under way"),
        (JobServerError("no job server answers"), openai.InternalServerError, "no job server answers"),
        (ConfigError("too many steps"), openai.BadRequestError, "too many steps"),
        (JobSetupError("port 52365 is taken"), openai.InternalServerError, "port 52365 is taken"),
        (JobError("secret token"), openai.InternalServerError, "the server failed"),
    ],
)
def test_what_the_cluster_says(
    server: Server, error: Exception, kind: type[openai.APIStatusError], message: str
) -> None:
    server.fakes.error = error
    with pytest.raises(kind, match=message) as raised:
        server.create()
    assert "secret" not in str(raised.value)
    assert raised.value.status_code in (400, 500, 503)
    server.fakes.error = None
    for call in (server.jobs.retrieve, server.jobs.cancel, server.jobs.list_events, server.jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError, match="no fine-tuning job 'ftjob-9'"):
            call("ftjob-9")


def test_it_is_off_unless_it_is_configured(tmp_path: Path) -> None:
    client = TestClient(
        make_app(GatewayDeps(FakePolicy(), None, None, ServingSection(), insecure=True)), base_url="http://localhost"
    )
    answers = [client.post("/v1/fine_tuning/jobs", json=ASK), client.get("/v1/fine_tuning/jobs")]
    answers += [client.get(f"/v1/fine_tuning/jobs/x{rest}") for rest in ("", "/events", "/checkpoints")]
    for answer in answers:
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "fine_tuning_off"
        assert "serving.fine_tuning" in answer.json()["error"]["message"]
    with pytest.raises(ConfigError, match=r"no serving\.fine_tuning"):
        make_app(GatewayDeps(FakePolicy(), None, None, ServingSection(), insecure=True, jobs=FakeJobs()))


# -- recipes -----------------------------------------------------------------------------------------------------------

ALLOWED = SETTINGS.fine_tuning
assert ALLOWED is not None


def no_rows(location: str) -> int:
    raise AssertionError("nobody asked for epochs")


def test_a_recipe_with_nothing_asked_is_itself() -> None:
    cfg = compose(ALLOWED, "/runs", "smol-1", TuningOrder("smol", "coco", seed=3), no_rows)
    assert (cfg.run.name, cfg.run.root, cfg.run.seed) == ("smol-1", "/runs", 3)
    assert (cfg.data.train, cfg.data.eval, cfg.data.prompt) == ("s3://data/coco", None, "What is it?")
    assert (cfg.model.path, cfg.model.lora.r, cfg.rollout.group_size) == ("hub/base", 4, 4)
    assert (cfg.learner.steps, cfg.learner.groups_per_step, cfg.learner.lr) == (50, 8, 1e-3)
    assert (cfg.learner.clip_high, cfg.learner.aggregation) == (0.28, "token_mean"), "the preset's"


def test_hyperparameters_go_where_they_belong() -> None:
    asked: list[str] = []

    def rows(location: str) -> int:
        asked.append(location)
        return 101

    order = TuningOrder("smol", "coco", "held-out", epochs=3, batch_size=10, lr_multiplier=2.0)
    cfg = compose(ALLOWED, "/runs", "x", order, rows)
    assert asked == ["s3://data/coco"]
    assert cfg.learner.steps == 31, "303 images, 10 a step"
    assert (cfg.learner.groups_per_step, cfg.data.eval) == (10, "/held-out")
    assert (cfg.learner.lr, cfg.learner.lr_min) == (2e-3, 2e-4)
    assert compose(ALLOWED, "/runs", "x", TuningOrder("smol", "coco", steps=5), no_rows).learner.steps == 5


def test_orders_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="would take 200,000 steps, and 100,000 are the most"):
        compose(ALLOWED, "/runs", "x", TuningOrder("smol", "coco", steps=200_000), no_rows)
    careful = {**RECIPE, "learner": {**RECIPE["learner"], "warmup_steps": 10, "workers": 4}}  # type: ignore[dict-item]
    allowed = FineTuningSection.model_validate({"models": {"m": careful}, "datasets": {"d": "x"}})
    with pytest.raises(ConfigError, match="warmup_steps=10 must be below steps=5"):
        compose(allowed, "/runs", "x", TuningOrder("m", "d", steps=5), no_rows)
    with pytest.raises(ConfigError, match=r"learner\.workers=4 is above learner\.groups_per_step=2"):
        compose(allowed, "/runs", "x", TuningOrder("m", "d", batch_size=2), no_rows)


def test_a_wrong_recipe_is_found_at_start() -> None:
    wrong = {**RECIPE, "learner": {"steps": 5, "groups_per_step": 2, "workers": 4}}
    with pytest.raises(ConfigError, match=r"serving\.fine_tuning\.models\.m: learner\.workers=4"):
        recipe_configs(FineTuningSection.model_validate({"models": {"m": wrong}, "datasets": {"d": "x"}}))
    recipe_configs(ALLOWED)
    with pytest.raises(ValueError, match="needs a root"):
        ServingSection(fine_tuning=ALLOWED)
    with pytest.raises(ValueError, match="models is empty"):
        FineTuningSection.model_validate({"models": {}, "datasets": {"d": "x"}})


def test_a_run_is_named_as_an_adapter_may_be() -> None:
    assert run_name(TuningOrder("big/vlm", "coco"), "0a1b2c3d") == "big-vlm-0a1b2c3d"
    assert run_name(TuningOrder("smol", "coco", suffix="mine"), "0a1b2c3d") == "mine-0a1b2c3d"
    assert len(run_name(TuningOrder("m" * 64, "coco"), "0a1b2c3d")) <= 64
