"""Jobs: accepted, drawn in their turn, fetched, deleted; and nothing is lost or drawn twice when the server dies."""

import json
import signal
import threading

import httpx
import pytest
from fastapi.testclient import TestClient
from serving_fixtures import BEARER, KEY, FakePackshot, config, eventually, fake_server, served, upload

from packshot.errors import ConfigError
from packshot.runs.folder import Run
from packshot.serve.app import create_app
from packshot.serve.devices import Picture
from packshot.serve.jobs import JobStore
from packshot.serve.keys import RateLimit, read_keys


class Stoppable(FakePackshot):
    """Waits in its first denoising step until it is released."""

    def __init__(self):
        super().__init__()
        self.began = threading.Event()
        self.release = threading.Event()

    def stream(self, scene, num_images, seed, reference, settings, on_step):
        def held():
            self.began.set()
            assert self.release.wait(60)
            on_step()

        return super().stream(scene, num_images, seed, reference, settings, held)


@pytest.fixture
def fake():
    return FakePackshot()


def started(client):
    """The client, once its app has a model."""
    assert eventually(lambda: client.app.state.service.loaded)
    return client


@pytest.fixture
def client(fake):
    with TestClient(create_app(config(), fake)) as client:
        yield started(client)


def create(client, headers=(), **fields):
    order = upload(**fields)
    return client.post("/jobs", **{**order, "headers": {**BEARER, **dict(headers)}})


def finished(client, job_id, seconds=60):
    """The job's last state."""
    address = f"/jobs/{job_id}"
    assert eventually(lambda: client.get(address, headers=BEARER).json()["state"] in ("done", "failed"), seconds)
    return client.get(address, headers=BEARER).json()


def test_a_job_gives_its_pictures_certificates_and_layers(client):
    answer = create(client, num_images=2, seed=7)
    job = answer.json()
    assert answer.status_code == 202, job
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    done = finished(client, job["id"])
    assert (done["state"], done["share_done"], done["seconds_left"]) == ("done", 1.0, None)
    assert [image["seed"] for image in done["images"]] == [7, 8]
    for image in done["images"]:
        certificate = client.get(image["certificate"], headers=BEARER).json()
        assert certificate["request"]["seed"] == image["seed"]
        for address in (image["image"], *image["layers"].values()):
            file = client.get(address, headers=BEARER)
            assert file.headers["content-type"] == "image/png"
            assert file.content.startswith(b"\x89PNG")
        assert set(image["layers"]) == {"background"}
    assert client.get("/jobs", headers=BEARER).json()["jobs"] == [done]


def test_a_deleted_job_is_gone_with_its_files(client):
    job_id = create(client).json()["id"]
    image = finished(client, job_id)["images"][0]["image"]
    assert client.delete(f"/jobs/{job_id}", headers=BEARER).status_code == 204
    for address in (f"/jobs/{job_id}", image):
        assert client.get(address, headers=BEARER).status_code == 404
    assert not client.app.state.service.jobs.path(job_id).exists()


def test_deleting_a_running_job_frees_the_device():
    """It ends at the denoising step in which it is deleted, of 200 that it asked for."""
    fake = Stoppable()
    with TestClient(create_app(config(), fake)) as client:
        started(client)
        job_id = create(client, num_images=4, num_inference_steps=50).json()["id"]
        assert fake.began.wait(60)
        assert client.delete(f"/jobs/{job_id}", headers=BEARER).status_code == 204
        fake.release.set()
        assert finished(client, create(client).json()["id"])["state"] == "done"
    assert fake.steps == 1 + 2


def test_an_abandoned_request_frees_the_device():
    """As above, for a client of /generate that has stopped waiting."""
    fake = Stoppable()
    with TestClient(create_app(config("serve.timeout_seconds=1"), fake)) as client:
        started(client)
        order = upload(num_images=4, num_inference_steps=50)
        assert client.post("/generate", **order).status_code == 504
        fake.release.set()
        assert client.post("/generate", **upload()).status_code == 200
    assert fake.steps == 1 + 2


def test_another_keys_jobs_do_not_exist(tmp_path, fake):
    (tmp_path / "keys").write_text("# who, key\nann  secret-of-ann\nbob secret-of-bob 7\n")
    ann = {"Authorization": "Bearer secret-of-ann"}
    bob = {"Authorization": "Bearer secret-of-bob"}
    with TestClient(create_app(config(f"serve.api_keys={tmp_path}/keys"), fake)) as client:
        started(client)
        job_id = create(client, ann).json()["id"]
        for headers, status in ((ann, 200), (bob, 404), (BEARER, 404), ({}, 401)):
            assert client.get(f"/jobs/{job_id}", headers=headers).status_code == status
        assert client.get("/jobs", headers=bob).json()["jobs"] == []
        assert client.delete(f"/jobs/{job_id}", headers=bob).status_code == 404


def test_a_key_over_its_rate_is_429(tmp_path, fake):
    (tmp_path / "keys").write_text("bob secret 2\n")
    bob = {"Authorization": "Bearer secret"}
    with TestClient(create_app(config(f"serve.api_keys={tmp_path}/keys"), fake)) as client:
        started(client)
        answers = [create(client, bob) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [202, 202, 429]
        assert answers[2].json()["error_code"] == "rate_limited"
        assert int(answers[2].headers["retry-after"]) >= 1
        assert create(client).status_code == 202  # another key has a rate of its own


def test_a_rate_limit_refills_with_time():
    now = [0.0]
    limit = RateLimit(2, lambda: now[0])
    assert [limit.wait() for _ in range(3)] == [0, 0, 30]
    now[0] = 30
    assert [limit.wait(), limit.wait()] == [0, 30]


@pytest.mark.parametrize("text", ["", "# nothing", "ann", "ann a b c", "ann a\nann b", "default key", "ann key 0"])
def test_a_wrong_key_file_is_refused_without_its_keys(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=r"serve\.api_keys") as raised:
        read_keys(str(tmp_path / "keys"), 60)
    assert " a b" not in str(raised.value)


def test_an_idempotency_key_gives_the_same_job(client, fake):
    first = create(client, {"Idempotency-Key": "x"}, seed=1).json()
    again = create(client, {"Idempotency-Key": "x"}, seed=1)
    assert (again.status_code, again.json()["id"]) == (202, first["id"])
    other = create(client, {"Idempotency-Key": "x"}, seed=2)
    assert (other.status_code, other.json()["error_code"]) == (422, "idempotency_mismatch")
    assert create(client, {"Idempotency-Key": "y"}, seed=1).json()["id"] != first["id"]
    finished(client, first["id"])
    assert create(client, {"Idempotency-Key": "x"}, seed=1).json()["state"] == "done"
    assert eventually(lambda: len(fake.calls) == 2)


def test_events_follow_a_job_to_its_end(client):
    job_id = create(client, num_images=2).json()["id"]
    with client.stream("GET", f"/jobs/{job_id}/events", headers=BEARER) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        states = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data")]
    assert states[-1]["state"] == "done"
    assert len(states[-1]["images"]) == 2
    shares = [state["share_done"] for state in states]
    assert shares == sorted(shares)


def test_waiting_jobs_have_a_place_and_a_time(tmp_path):
    fake = Stoppable()
    with TestClient(create_app(config("serve.max_jobs=3"), fake)) as client:
        started(client)
        jobs = [create(client).json()["id"] for _ in range(3)]
        assert fake.began.wait(60)
        states = [client.get(f"/jobs/{job_id}", headers=BEARER).json() for job_id in jobs]
        assert [state["state"] for state in states] == ["running", "queued", "queued"]
        assert [state["queue_position"] for state in states] == [0, 1, 2]
        left = [state["seconds_left"] for state in states]
        assert 0 < left[0] < left[1] < left[2]
        full = create(client)
        assert (full.status_code, full.json()["error_code"]) == (429, "queue_full")
        fake.release.set()
        assert finished(client, jobs[2])["state"] == "done"


def test_a_failed_job_shows_the_reason_and_no_paths(fake):
    def broken(*_):
        raise RuntimeError("secret /path/to/weights")

    with TestClient(create_app(config(), fake)) as client:
        started(client)
        client.app.state.service.queue.devices[0].draw = broken
        state = finished(client, create(client).json()["id"])
    assert state["error"]["error_code"] == "internal_error"
    assert "secret" not in json.dumps(state)


def test_a_job_with_an_unusable_picture_is_refused_at_once(client):
    order = upload()
    order["files"]["product_file"] = b"text"
    answer = client.post("/jobs", **order)
    assert (answer.status_code, answer.json()["error_code"]) == (415, "not_an_image")
    assert client.get("/jobs", headers=BEARER).json()["jobs"] == []


def test_jobs_are_drawn_after_a_restart(tmp_path):
    """The running one is drawn again from its beginning, and waiting ones in the order in which they came."""
    run = Run(tmp_path, resumed=False)
    fake = Stoppable()
    with TestClient(create_app(config(), fake, run)) as client:
        started(client)
        jobs = [create(client, seed=seed).json()["id"] for seed in (1, 2, 3)]
        assert fake.began.wait(60)
        client.app.state.service.closing = True
        threading.Timer(0.2, fake.release.set).start()
    assert len(fake.calls) == 1
    second = FakePackshot()
    with TestClient(create_app(config(), second, run)) as client:
        started(client)
        assert [finished(client, job_id)["state"] for job_id in jobs] == ["done"] * 3
    assert [seed for *_, seed in second.calls] == [1, 2, 3]


def store_with_job(folder, state="running", attempts=1):
    store = JobStore(folder, 3600)
    job = store.add("default", "{}", {"product_file": b"x"}, 0, 2, None)
    store.execute("UPDATE jobs SET state = ?, attempts = ?", (state, attempts))
    return store, job.id


def test_a_whole_result_is_never_drawn_again(tmp_path):
    """Killed after the results were renamed and before the row was written."""
    store, job_id = store_with_job(tmp_path)
    store.finish(job_id, [Picture(b"png", {})])
    store.execute("UPDATE jobs SET state = 'running'")
    assert JobStore(tmp_path, 3600).recover() == []
    assert store.get(job_id, "default").state == "done"


def test_half_a_result_is_drawn_again(tmp_path):
    store, job_id = store_with_job(tmp_path)
    half = store.path(job_id) / "results.tmp"
    half.mkdir()
    (half / "0.png").write_bytes(b"half")
    assert [job.id for job in store.recover()] == [job_id]
    store.begin(job_id)
    store.finish(job_id, [Picture(b"whole", {})])
    assert store.files(job_id)["0.png"].read_bytes() == b"whole"


def test_a_job_that_ends_the_server_three_times_is_failed(tmp_path):
    store, job_id = store_with_job(tmp_path, attempts=3)
    assert store.recover() == []
    assert store.get(job_id, "default").error["error_code"] == "interrupted"


def test_a_folder_without_a_row_is_removed_and_old_jobs_purged(tmp_path):
    store, job_id = store_with_job(tmp_path)
    (tmp_path / "orphan" / "inputs").mkdir(parents=True)
    store.finish(job_id, [Picture(b"png", {})])
    store.execute("UPDATE jobs SET finished = 1")
    assert store.recover() == []
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert store.get(job_id, "default") is None


def result_names(folder):
    """The names of all result files, temporary ones included, by job."""
    found = {}
    for path in sorted(folder.glob("jobs/*/results*/*")):
        found.setdefault(path.parts[-3], []).append(path.name)
    return found


def test_after_kill_9_every_accepted_job_has_one_result(tmp_path):
    """The server is killed in the middle of a job, twice, and started again."""
    jobs = []
    for round_number in range(3):
        command = fake_server(tmp_path / "run", step_seconds=0.1 if round_number < 2 else 0.0)
        with served(command) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
            if round_number < 2:
                jobs += [create(client, seed=seed, num_inference_steps=10).json()["id"] for seed in (1, 2)]
                running = f"/jobs/{jobs[0]}"
                assert eventually(lambda: client.get(running, headers=BEARER).json()["share_done"] > 0)  # noqa: B023
                process.send_signal(signal.SIGKILL)
                process.wait(60)
                continue
            assert [finished(client, job_id)["state"] for job_id in jobs] == ["done"] * 4
            assert result_names(tmp_path / "run") == {
                job_id: ["0-background.png", "0.json", "0.png"] for job_id in jobs
            }


@pytest.mark.slow
def test_after_kill_9_the_real_model_draws_the_same_picture(tmp_path):
    """Killed in the middle of its denoising steps: the job is drawn once more, to the same picture."""
    keys = [f"run.dir={tmp_path}/run", "run.resume=true", "serve.port=0", f"serve.api_key={KEY}", "tracking=none"]
    order = {"seed": 3, "num_inference_steps": 30}
    with served(["serve.py", *keys]) as (process, url), httpx.Client(base_url=url, timeout=600) as client:
        killed = create(client, {"Idempotency-Key": "once"}, **order).json()["id"]
        address = f"/jobs/{killed}"
        assert eventually(lambda: 0 < client.get(address, headers=BEARER).json()["share_done"] < 1)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    with served(["serve.py", *keys]) as (_, url), httpx.Client(base_url=url, timeout=600) as client:
        repeated = create(client, {"Idempotency-Key": "once"}, **order).json()["id"]
        undisturbed = create(client, **order).json()["id"]
        pictures = []
        for job_id in (killed, undisturbed):
            assert finished(client, job_id, 300)["state"] == "done"
            pictures.append(client.get(f"/jobs/{job_id}/files/0.png", headers=BEARER).content)
    assert repeated == killed
    assert pictures[0] == pictures[1]
    assert set(result_names(tmp_path / "run")) == {killed, undisturbed}
