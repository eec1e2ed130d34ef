"""The HTTP API against the whole graph in one process."""

import asyncio
import hashlib
import json
from pathlib import Path

import pytest
from in_process import Running, views
from sqlalchemy.exc import OperationalError

from serve_app import ingress, router
from serve_app.jobs import NewJob, new_id

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("stores")]

PROBLEM = "application/problem+json"


async def test_a_job_ends_with_checked_artifacts_and_a_report(running: Running):
    answer = await running.submit(options={"formats": ["glb", "stl"], "seed": 7})
    job = answer.json()
    assert answer.status_code == 200
    assert answer.headers["location"] == f"/v1/reconstructions/{job['id']}"
    assert answer.headers["preference-applied"] == "wait=20"
    assert (job["state"], job["percent"], job["error"]) == ("succeeded", 100.0, None)
    assert {a["name"] for a in job["artifacts"]} == {"mesh.glb", "mesh.stl", "report.json", "thumbnail.png"}
    for artifact in job["artifacts"]:
        body = (await running.http.get(artifact["url"])).content
        assert hashlib.sha256(body).hexdigest() == artifact["sha256"]
        assert len(body) == artifact["bytes"]
    assert job["report"]["seed"] == 7
    assert set(job["report"]["seconds"]) == {"prepare", "optimise", "finish"}


async def test_the_model_that_auto_picked_and_why(running: Running):
    queued = (await running.submit(wait=None)).json()
    because = "trellis, better for few views without cameras, is not ready here"
    assert (queued["model"], queued["chosen_because"]) == ("nvdiffrec", because)
    job = await running.until(queued["id"], "succeeded")
    assert job["chosen_because"] == job["report"]["chosen_because"] == because
    url = f"/v1/reconstructions/{job['id']}/exports"
    again = await running.http.post(url, json={"formats": ["stl"]}, headers={"prefer": "wait=20"})
    assert again.json()["report"]["chosen_because"] == because
    failed = (await running.submit(fail="empty_reconstruction")).json()
    assert (failed["state"], failed["chosen_because"]) == ("failed", because)
    named = (await running.submit(options={"model": "nvdiffrec"})).json()
    assert named["chosen_because"] == ""
    assert "chosen_because" not in named["report"]


async def test_without_a_wait_the_answer_is_202_with_a_place_to_look(running: Running):
    answer = await running.submit(wait=None)
    assert answer.status_code == 202
    assert answer.json()["state"] == "queued"
    assert "events" in answer.headers["link"]
    assert (await running.until(answer.json()["id"], "succeeded"))["finished_at"]


async def test_a_waiting_client_may_ask_for_the_glb_itself(running: Running):
    answer = await running.submit(headers={"accept": "model/gltf-binary"})
    assert answer.headers["content-type"] == "model/gltf-binary"
    assert answer.content[:4] == b"glTF"


async def test_events_count_from_one_without_gap_and_end_with_done(running: Running):
    job = (await running.submit()).json()
    events = await running.events(job["id"])
    assert [number for number, _, _ in events] == list(range(1, len(events) + 1))
    assert events[0][1:] == ("state", {"state": "queued"})
    assert events[-1][1:] == ("done", {"state": "succeeded"})
    percents = [data["percent"] for _, kind, data in events if kind == "progress"]
    assert percents == sorted(set(percents))
    assert {"state", "progress", "preview", "artifact", "done"} == {kind for _, kind, _ in events}


async def test_last_event_id_replays_exactly_what_came_after_it(running: Running):
    job = (await running.submit()).json()
    events = await running.events(job["id"])
    assert await running.events(job["id"], after=3) == events[3:]
    over = await running.http.get(
        f"/v1/reconstructions/{job['id']}/events", headers={"last-event-id": str(len(events))}
    )
    assert over.status_code == 204


async def test_a_last_event_id_that_is_not_there_yet_hides_no_end(running: Running):
    job = (await running.submit(wait=None, optimise_s=60)).json()
    listening = asyncio.create_task(running.events(job["id"], after=99_999))
    while job["id"] not in running.service.hub.watches:
        await asyncio.sleep(0.01)
    await running.http.post(f"/v1/reconstructions/{job['id']}/cancel")
    assert (await asyncio.wait_for(listening, 20))[-1][1:] == ("done", {"state": "cancelled"})


def away(*args):
    raise OperationalError("SELECT", {}, OSError("no"))


async def test_a_cancelled_job_stops_working_also_where_the_first_try_half_failed(
    running: Running, tmp_path, monkeypatch
):
    answer = await running.submit(wait=None, optimise_s=60, steps=600, scratch=str(tmp_path))
    job_id = answer.json()["id"]
    for _ in range(100):
        if (tmp_path / "step").exists():
            break
        await asyncio.sleep(0.05)
    with monkeypatch.context() as broken:
        broken.setattr(running.service.workflows, "cancel", away)
        assert (await running.http.post(f"/v1/reconstructions/{job_id}/cancel")).status_code == 503
    cancelled = await running.http.post(f"/v1/reconstructions/{job_id}/cancel")
    assert cancelled.status_code == 202
    assert cancelled.json()["state"] == "cancelled"
    await asyncio.sleep(2.0)
    before = (tmp_path / "step").read_text()
    await asyncio.sleep(0.5)
    assert (tmp_path / "step").read_text() == before
    while running.service.artifacts.exists(f"jobs/{job_id}"):
        await asyncio.sleep(0.05)
    assert (await running.events(job_id))[-1][1:] == ("done", {"state": "cancelled"})
    again = await running.http.post(f"/v1/reconstructions/{job_id}/cancel")
    assert again.status_code == 202


async def test_cancelling_what_is_over_is_a_conflict(running: Running):
    job = (await running.submit()).json()
    answer = await running.http.post(f"/v1/reconstructions/{job['id']}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "already_over")


async def test_deleting_a_job_removes_its_files_and_its_inputs(running: Running):
    job = (await running.submit(finish_s=0.01)).json()
    there = running.service.artifacts.exists
    glb = next(row["key"] for row in running.service.store.artifacts([job["id"]])[job["id"]])
    inputs = [ref["key"] for ref in running.service.store.get(job["id"])["inputs"].values()]
    assert there(glb)
    assert there(inputs[0])
    assert (await running.http.delete(f"/v1/reconstructions/{job['id']}")).status_code == 204
    assert not there(glb)
    assert not there(f"jobs/{job['id']}")
    assert (await running.http.get(f"/v1/reconstructions/{job['id']}")).status_code == 404
    assert not there(inputs[0])


async def test_an_input_that_another_job_uses_survives_a_delete(running: Running):
    first = (await running.submit(finish_s=0.02)).json()
    second = (await running.submit(finish_s=0.02)).json()
    key = running.service.store.get(second["id"])["inputs"]["views/view_00.png"]["key"]
    await running.http.delete(f"/v1/reconstructions/{first['id']}")
    assert running.service.artifacts.exists(key)


async def test_a_running_job_can_be_deleted(running: Running):
    job_id = (await running.submit(wait=None, optimise_s=30)).json()["id"]
    await running.until(job_id, "running")
    assert (await running.http.delete(f"/v1/reconstructions/{job_id}")).status_code == 204
    assert (await running.http.get(f"/v1/reconstructions/{job_id}")).status_code == 404


async def test_the_same_idempotency_key_and_body_is_the_same_job(running: Running):
    key = {"idempotency-key": "once"}
    first, second = await asyncio.gather(running.submit(headers=key), running.submit(headers=key))
    assert first.json()["id"] == second.json()["id"]
    other = await running.submit(headers=key, options={"seed": 5})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    url, asked = f"/v1/reconstructions/{first.json()['id']}/exports", {"formats": ["ply"]}
    exports = [(await running.http.post(url, json=asked, headers=key)).json()["id"] for _ in range(2)]
    assert exports[0] == exports[1]
    for path, body in ((url, {"json": asked}), ("/v1/reconstructions", {"files": views()})):
        bad = await running.http.post(path, headers={"idempotency-key": "a b"}, **body)
        assert (bad.status_code, bad.json()["code"]) == (400, "bad_idempotency_key")


async def test_an_export_runs_no_model(running: Running, tmp_path):
    job = (await running.submit(scratch=str(tmp_path))).json()
    steps = (tmp_path / "step").read_text()
    answer = await running.http.post(
        f"/v1/reconstructions/{job['id']}/exports",
        json={"formats": ["ply"], "target_faces": 500},
        headers={"prefer": "wait=20"},
    )
    export = answer.json()
    assert answer.status_code == 200
    assert (export["state"], export["kind"], export["parent"]) == ("succeeded", "export", job["id"])
    assert export["options"]["target_faces"] == 500
    assert "mesh.ply" in {a["name"] for a in export["artifacts"]}
    assert (tmp_path / "step").read_text() == steps
    again = await running.http.post(
        f"/v1/reconstructions/{export['id']}/exports",
        json={"formats": ["stl"], "texture_size": 256},
        headers={"prefer": "wait=20"},
    )
    assert again.json()["parent"] == job["id"]
    assert again.json()["report"]["reexport"] == {"target_faces": 500, "texture_size": 256}


async def test_an_export_needs_a_finished_reconstruction(running: Running):
    job = (await running.submit(fail="empty_reconstruction")).json()
    answer = await running.http.post(f"/v1/reconstructions/{job['id']}/exports", json={"formats": ["ply"]})
    assert (answer.status_code, answer.json()["code"]) == (409, "not_finished")


async def test_an_export_is_refused_where_a_reconstruction_is(running: Running, monkeypatch):
    monkeypatch.setattr(running.service.args.outbound, "webhook_secret", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    url = f"/v1/reconstructions/{(await running.submit()).json()['id']}/exports"
    cases = [
        ({"formats": ["ply"]}, "one", 202, None),
        ({"formats": ["ply"]}, "one", 202, None),
        ({"formats": ["ply"], "webhook_url": "https://example.com/hook"}, "one", 422, "idempotency_key_reused"),
        ({"formats": ["gaussian_ply"]}, "two", 422, "invalid_option"),
        ({"formats": ["ply"]}, "a b", 400, "bad_idempotency_key"),
    ]
    for body, key, status, code in cases:
        answer = await running.http.post(url, json=body, headers={"idempotency-key": key})
        assert (answer.status_code, answer.json().get("code")) == (status, code), body


@pytest.mark.parametrize(
    "sent", [{"content": b'{"formats": ["ply"]}'}, {"data": {"formats": "ply"}}, {"json": "ply"}, {}]
)
async def test_an_export_whose_body_is_no_object_is_told_what_to_send(running: Running, sent):
    url = f"/v1/reconstructions/{(await running.submit()).json()['id']}/exports"
    answer = await running.http.post(url, **sent)
    assert answer.status_code == 422
    assert "content-type: application/json" in answer.json()["hint"]
    assert not (await running.http.post(url, json={"formats": ["none"]})).json()["hint"]


async def test_deleting_a_reconstruction_stops_its_exports(running: Running, monkeypatch):
    job = (await running.submit()).json()
    export = NewJob(new_id(), "anonymous", "export", "nvdiffrec", {}, {}, "h", parent=job["id"])
    running.service.store.accept(export, lambda *args: None)
    told = []
    monkeypatch.setattr(running.service.workflows, "cancel", told.append)
    assert (await running.http.delete(f"/v1/reconstructions/{job['id']}")).status_code == 204
    assert told == [export.id]
    assert running.service.store.get(export.id) is None


@pytest.mark.parametrize(
    ("code", "at"),
    [
        ("invalid_input", "prepare"),
        ("unposed_views", "prepare"),
        ("out_of_memory", "optimise"),
        ("empty_reconstruction", "optimise"),
        ("invalid_mesh", "export"),
        ("model_missing", "optimise"),
        ("internal_error", "optimise"),
    ],
)
async def test_each_failure_has_its_own_code(running: Running, code: str, at: str):
    job = (await running.submit(fail=code, at=at)).json()
    assert (job["state"], job["error"]["code"], job["artifacts"]) == ("failed", code, [])
    assert job["error"]["hint"] or code in ("invalid_input", "invalid_mesh")
    assert "secret" not in json.dumps(job)
    done = (await running.events(job["id"]))[-1][2]
    assert done["error"]["code"] == code
    if code == "out_of_memory":
        assert job["error"]["details"] == {
            "needed_bytes": 40 * 2**30,
            "free_bytes": 8 * 2**30,
            "device": "cuda:0",
        }


async def test_device_memory_that_runs_out_once_costs_a_smaller_retry(running: Running, tmp_path):
    job = (await running.submit(fail="out_of_memory", times=1, scratch=str(tmp_path))).json()
    assert job["state"] == "succeeded"
    assert [line.split()[1] for line in (tmp_path / "start").read_text().splitlines()] == ["full", "smaller"]


async def test_list_pages_newest_first_and_filters(running: Running):
    failed = (await running.submit(fail="invalid_mesh")).json()
    ids = [(await running.submit(finish_s=0.001 * i)).json()["id"] for i in range(3)]
    seen: list[str] = []
    url = "/v1/reconstructions?limit=2&state=succeeded"
    while url:
        answer = await running.http.get(url)
        seen += [item["id"] for item in answer.json()["items"]]
        link = answer.headers.get("link", "")
        url = link.partition(">")[0].removeprefix("<")
    assert seen[:3] == ids[::-1]
    assert len(seen) == len(set(seen))
    found = (await running.http.get("/v1/reconstructions?state=failed")).json()["items"]
    assert found[0]["id"] == failed["id"]
    assert {item["state"] for item in found} == {"failed"}


async def test_head_answers_as_get_does_without_the_body(running: Running):
    url = (await running.submit()).json()["artifacts"][0]["url"]
    for path, status in ((url, 200), ("/livez", 200), ("/readyz", 200), ("/", 200), (f"{url}x", 404)):
        whole, head = await running.http.get(path), await running.http.head(path)
        assert (head.status_code, whole.status_code) == (status, status), path
        assert head.content == b""
        varying = {"x-request-id", "content-length"} if status == 404 else {"x-request-id"}
        assert {k: v for k, v in head.headers.items() if k not in varying} == {
            k: v for k, v in whole.headers.items() if k not in varying
        }
    etag = (await running.http.head(url)).headers["etag"]
    assert (await running.http.head(url, headers={"if-none-match": etag})).status_code == 304
    assert (await running.http.head(url, headers={"range": "bytes=0-3"})).status_code == 200
    refused = await running.http.put(url)
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


async def test_ranges_and_etags(running: Running):
    job = (await running.submit()).json()
    url = next(a["url"] for a in job["artifacts"] if a["name"] == "mesh.glb")
    whole = await running.http.get(url)
    get = running.http.get
    assert whole.headers["etag"] == f'"{hashlib.sha256(whole.content).hexdigest()}"'
    part = await get(url, headers={"range": "bytes=4-11"})
    assert (part.status_code, part.content) == (206, whole.content[4:12])
    assert part.headers["content-range"] == f"bytes 4-11/{len(whole.content)}"
    assert (await get(url, headers={"range": "bytes=-5"})).content == whole.content[-5:]
    assert (await get(url, headers={"range": f"bytes={len(whole.content)}-"})).status_code == 416
    assert (await get(url, headers={"range": "bytes=0-3", "if-range": '"other"'})).status_code == 200
    assert (await get(url, headers={"if-none-match": whole.headers["etag"]})).status_code == 304
    assert (await get(url.replace("mesh.glb", "..%2F..%2Fjobs.sqlite"))).status_code == 404
    running.service.artifacts.remove(running.service.store.artifact(job["id"], "mesh.glb")["key"])
    assert ((gone := await get(url)).status_code, gone.json()["code"]) == (404, "not_found")


async def test_models_say_what_is_ready_and_the_command_that_helps(running: Running):
    found = {model["name"]: model for model in (await running.http.get("/v1/models")).json()["models"]}
    assert found["nvdiffrec"]["ready"]
    assert found["trellis"]["hint"] == "viewmesh weights download trellis"
    assert "cfg" in found["trellis"]["options"]["properties"]
    assert "cfg" not in found["nvdiffrec"]["options"]["properties"]
    answer = await running.submit(options={"model": "trellis"})
    assert (answer.status_code, answer.json()["code"]) == (503, "model_missing")
    assert answer.json()["hint"] == "viewmesh weights download trellis"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/reconstructions/nope", 404, "not_found"),
        ("GET", "/v1/reconstructions/nope/events", 404, "not_found"),
        ("PUT", "/v1/reconstructions", 405, "method_not_allowed"),
        ("GET", "/v1/reconstructions?limit=0", 422, "invalid_option"),
        ("GET", "/v1/reconstructions?state=lost", 422, "invalid_option"),
        ("GET", "/v1/reconstructions?cursor=%00", 400, "bad_cursor"),
        ("GET", "/v1/reconstructions?cursor=MXwA", 400, "bad_cursor"),  # 1|NUL
        ("GET", "/v1/reconstructions/%00", 422, "invalid_option"),
        ("GET", "/v1/reconstructions/nope/artifacts/%00", 422, "invalid_option"),
        ("POST", "/v1/reconstructions", 415, "unsupported_media_type"),
        ("POST", "/v1/reconstructions/nope/exports", 422, "invalid_option"),
        ("GET", "/static/../../settings.py", 404, "not_found"),
    ],
)
async def test_every_refusal_is_a_problem(running: Running, method: str, path: str, status: int, code: str):
    answer = await running.http.request(method, path, headers={"x-request-id": "abc"})
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    body = answer.json()
    assert (body["code"], body["status"], body["request_id"]) == (code, status, "abc")
    assert answer.headers["x-request-id"] == "abc"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_headers_that_switch_serve_are_not_for_callers(running: Running):
    seen = {}

    async def inner(scope, receive, send):
        seen.update(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    edge = running.service.asgi()
    edge.app = inner
    import httpx

    (middleware,) = ingress.middlewares()
    wrapped = middleware.cls(edge, *middleware.args, **middleware.kwargs)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(wrapped), base_url="http://test") as client:
        headers = {name.decode(): "-1" for name in ingress.STRIPPED}
        answer = await client.get("/livez", headers={**headers, "x-request-id": "a b\tc"})
    assert seen
    assert not ingress.STRIPPED & set(seen)
    assert answer.headers["x-request-id"] != "a b\tc"


async def test_a_bug_shows_no_traceback(running: Running, monkeypatch):
    monkeypatch.setattr(running.service.store, "view", lambda *a: 1 / 0)
    answer = await running.http.get("/v1/reconstructions/some")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "division" not in answer.text


async def test_a_store_that_is_full_or_away_is_a_503_that_says_so(running: Running, monkeypatch):
    from deployments.artifacts import StoreFull

    def full(*args, **kwargs):
        raise StoreFull("Could not write inputs: no space left.", hint="Free disk space.")

    monkeypatch.setattr(running.service.artifacts, "put", full)
    answer = await running.submit()
    assert (answer.status_code, answer.json()["code"]) == (503, "storage_full")
    assert int(answer.headers["retry-after"]) > 0


async def test_too_many_requests_at_once_are_turned_away_in_our_own_words(running: Running):
    edge = running.service.asgi()
    edge.requests = running.service.config.limits.requests
    import httpx

    async with httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://test") as client:
        answers = [
            await client.get("/v1/models"),
            await client.get("/v1/models", headers={"prefer": "wait=1"}),  # only posts wait
            await client.post("/v1/reconstructions", headers={"prefer": "no-wait"}),
        ]
        waiting = await client.post("/v1/reconstructions", headers={"prefer": "wait=1"})
    for answer in answers:
        assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "busy", "1")
    assert waiting.status_code == 415


async def test_the_page_needs_nothing_from_elsewhere(running: Running):
    answer = await running.http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    names = {file.name for file in Path(router.__file__).with_name("static").iterdir()}
    assert {"index.html", "docs.html", "viewer.js"} <= names
    for name in names:
        path = {"index.html": "/", "docs.html": "/docs"}.get(name, f"/static/{name}")
        text = (await running.http.get(path)).text
        assert text.strip()
        assert "http://" not in text.replace("http://www.w3.org", "").replace("http://127.0.0.1", "")
        assert "https://" not in text


async def test_a_job_of_fifty_views_keeps_their_names(running: Running):
    answer = await running.http.post("/v1/reconstructions", files=views(50), headers={"prefer": "wait=20"})
    assert answer.json()["report"]["views"] == 50


async def test_a_database_that_is_away_is_a_503_that_says_so(running: Running, monkeypatch):
    monkeypatch.setattr(running.service.store, "view", away)
    answer = await running.http.get("/v1/reconstructions/some")
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert answer.headers["retry-after"]


async def test_what_has_expired_or_belongs_to_nobody_is_swept_away(running: Running, monkeypatch):
    from types import SimpleNamespace

    from sqlalchemy import update

    from serve_app import conductor
    from serve_app.conductor import Conductor
    from serve_app.database import jobs

    kept, old = (await running.submit(finish_s=0.03)).json(), (await running.submit(finish_s=0.04)).json()
    store, artifacts = running.service.store, running.service.artifacts
    with store.engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == old["id"]).values(expires=1.0))
    orphans = [artifacts.put_bytes(b"x", key).key for key in ("jobs/nobody/views", "inputs/ff/ff00", "tmp/left")]
    monkeypatch.setattr(conductor, "ORPHAN_S", -2.0)  # whatever nobody knows is old enough
    sweeper = object.__new__(Conductor.func_or_class)
    sweeper.store, sweeper.workflows, sweeper.artifacts = store, running.service.workflows, artifacts
    sweeper.lease = SimpleNamespace(require=lambda: None)
    await asyncio.to_thread(sweeper.sweep)
    assert not any(artifacts.exists(key) for key in orphans)
    assert (await running.http.get(f"/v1/reconstructions/{old['id']}")).status_code == 404
    assert (await running.http.get(kept["artifacts"][0]["url"])).status_code == 200


async def test_a_job_whose_workflow_ended_in_silence_is_ended(running: Running):
    from types import SimpleNamespace

    from sqlalchemy import update

    from serve_app.conductor import Conductor
    from serve_app.database import jobs

    store = running.service.store
    job = NewJob(new_id(), "anonymous", "reconstruction", "nvdiffrec", {}, {}, "h")
    store.accept(job, lambda *args: None)  # accepted, but no workflow was enqueued
    with store.engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(created=1.0))
    sweeper = object.__new__(Conductor.func_or_class)
    sweeper.store, sweeper.workflows = store, running.service.workflows
    sweeper.calls = SimpleNamespace(_expires=lambda: None)
    await asyncio.to_thread(sweeper._reconcile)
    shown = (await running.http.get(f"/v1/reconstructions/{job.id}")).json()
    assert (shown["state"], shown["error"]["code"]) == ("failed", "internal_error")
