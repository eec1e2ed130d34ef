"""API keys, quotas, owners apart from each other, and the refusal to be open by accident."""

import hashlib
import os

import httpx
import pytest
import yaml
from in_process import views
from typer.testing import CliRunner

from deployments.fakes import fake_view
from serve_app.asgi import Edge
from serve_app.auth import KeyRing, new_key, refuse_to_be_open
from serve_app.cli import config
from serve_app.router import Service
from serve_app.settings import AppArgs, RouterConfig
from viewmesh.errors import OptionError

URL = "/v1/reconstructions"


def keys_file(folder, **owners: dict):
    keys, entries = {}, []
    for owner, more in owners.items():
        keys[owner], digest = new_key()
        entries.append({"owner": owner, "sha256": digest, **more})
    file = folder / "keys.yaml"
    file.write_text(yaml.safe_dump(entries))
    return file, {owner: {"authorization": f"Bearer {key}"} for owner, key in keys.items()}


async def test_keys_owners_and_quotas(fresh, tmp_path):
    file, by = keys_file(tmp_path, ann={"max_active_jobs": 1}, bob={"upload_bytes_per_day": 3000})
    async with fresh(auth={"keys_file": str(file)}) as running:
        http = running.http
        nobody = await http.get(URL)
        assert (nobody.status_code, nobody.json()["code"]) == (401, "unauthorized")
        assert nobody.headers["www-authenticate"] == "Bearer"
        assert (await http.get(URL, headers={"authorization": "Bearer vm_wrong"})).status_code == 401
        assert (await http.get(URL, headers={"x-api-key": by["ann"]["authorization"][7:]})).status_code == 200
        assert (await http.get("/readyz")).status_code == 200
        elsewhere = {"host": "viewmesh.example", "origin": "https://other.example"}
        assert (await http.get(URL, headers={**by["ann"], **elsewhere})).status_code == 200

        mine = await http.post(URL, files=views(optimise_s=20), headers=by["ann"])
        job_id = mine.json()["id"]
        full = await http.post(URL, files=views(), headers=by["ann"])
        assert (full.status_code, full.json()["code"]) == (429, "too_many_jobs")
        assert int(full.headers["retry-after"]) > 0

        for method, path in [("GET", ""), ("GET", "/events"), ("GET", "/artifacts/mesh.glb"), ("POST", "/cancel"),
                             ("DELETE", ""), ("POST", "/exports")]:  # fmt: skip
            body = {"json": {"formats": ["ply"]}} if path == "/exports" else {}
            answer = await http.request(method, f"{URL}/{job_id}{path}", headers=by["bob"], **body)
            assert answer.status_code == 404, (method, path)
        assert (await http.get(URL, headers=by["bob"])).json()["items"] == []
        same_key = {"idempotency-key": "k"}
        big = [("views", ("view_00.png", fake_view() + b" " * 2000))]
        theirs = await http.post(URL, files=big, headers={**by["bob"], **same_key})
        assert theirs.status_code == 202
        again = await http.post(URL, files=big, headers={**by["bob"], **same_key})
        assert (again.status_code, again.json()["id"]) == (202, theirs.json()["id"])
        more = await http.post(URL, files=big, headers=by["bob"])
        assert (more.status_code, more.json()["code"]) == (429, "upload_quota")
        await http.delete(f"{URL}/{theirs.json()['id']}", headers=by["bob"])
        request = http.build_request("POST", URL, files=big)

        async def unannounced():
            yield request.read()

        kind = {"content-type": request.headers["content-type"]}
        more = await http.post(URL, content=unannounced(), headers={**by["bob"], **kind})
        assert (more.status_code, more.json()["code"]) == (429, "upload_quota")
        await http.delete(f"{URL}/{job_id}", headers=by["ann"])
        ours = await http.post(URL, files=views(), headers={**by["ann"], **same_key})
        assert ours.json()["id"] != theirs.json()["id"]


async def test_what_was_sent_counts_also_where_it_became_no_job(fresh, tmp_path):
    file, by = keys_file(tmp_path, ann={"upload_bytes_per_day": 10_000, "max_active_jobs": 1})
    big = [("views", ("view_00.png", fake_view(optimise_s=30) + b" " * 3000))]
    async with fresh(auth={"keys_file": str(file)}) as running:

        async def post(**data):
            return await running.http.post(URL, files=big, data=data, headers=by["ann"])

        refused = [await post(options='{"no": 1}') for _ in range(4)]
        assert [answer.json()["code"] for answer in refused] == ["invalid_option"] * 3 + ["upload_quota"]

        running.service.store.charge("ann", -9000)  # as if it were tomorrow
        assert (await post()).status_code == 202
        read = []

        async def body():
            read.append(True)
            yield b"x"

        kind = {"content-type": "multipart/form-data; boundary=x"}
        full = await running.http.post(URL, content=body(), headers={**by["ann"], **kind})
        assert (full.status_code, full.json()["code"], read) == (429, "too_many_jobs", [])


@pytest.mark.parametrize(
    ("host", "more", "reads", "writes"),
    [
        ("127.0.0.1:8000", {}, 200, 200),
        ("localhost:8000", {"origin": "http://localhost:8000"}, 200, 200),
        ("[::1]:8000", {"origin": "http://[::1]:8000"}, 200, 200),
        ("", {}, 200, 200),  # HTTP/1.0
        ("testserver", {}, 200, 200),
        ("10.0.0.5", {}, 200, 200),
        ("host.docker.internal:8000", {}, 200, 200),
        ("127.0.0.1:8000", {"origin": "https://mesh.example", "sec-fetch-site": "same-origin"}, 200, 200),  # a proxy
        ("127.0.0.1:8000", {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}, 200, 403),
        ("localhost:8000", {"origin": "http://localhost:3000"}, 200, 403),
        ("127.0.0.1:8000", {"origin": "null"}, 200, 403),
        ("evil.example:8000", {"origin": "http://evil.example:8000"}, 403, 403),
        ("evil.example", {}, 403, 403),
        ("127.0.0.1.evil.example", {}, 403, 403),
        ("[", {}, 403, 403),
    ],
)
async def test_without_keys_only_this_machine_and_its_own_pages_are_served(host, more, reads, writes):
    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    edge = Edge(inner, KeyRing(None).caller, RouterConfig, local_only=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://x") as http:
        headers = {"host": host, **more}
        assert (await http.get("/readyz", headers=headers)).status_code == 200
        for method, status in (("GET", reads), ("POST", writes), ("DELETE", writes)):
            answer = await http.request(method, URL, headers=headers)
            assert answer.status_code == status
            assert status == 200 or "auth.open" in answer.json()["hint"]


@pytest.mark.parametrize(("auth", "status"), [({}, 403), ({"open": True}, 415)])
async def test_an_open_service_is_for_all_sites(tmp_path, auth, status):
    service = Service(AppArgs.model_validate({"data": tmp_path, "auth": auth}), None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.asgi()), base_url="http://mesh.example") as http:
        assert (await http.post(URL, headers={"origin": "https://other.example"})).status_code == status
    await service.close()


def test_the_keys_file_is_read_again_when_it_changes_and_kept_while_it_is_broken(tmp_path):
    file, by = keys_file(tmp_path, ann={})
    ring = KeyRing(file)
    assert ring.caller(by["ann"]["authorization"], None).owner == "ann"
    file.write_text("- owner: [")
    os.utime(file, (1, 1))
    assert ring.caller(by["ann"]["authorization"], None).owner == "ann"
    file.write_text("[]")
    os.utime(file, (2, 2))
    assert ring.caller(by["ann"]["authorization"], None) is None
    assert ring.caller("Bearer ", "") is None


def test_no_key_is_kept_in_the_clear(tmp_path):
    file = tmp_path / "keys.yaml"
    made = CliRunner().invoke(config, ["key", "ann", "--file", str(file), "--max-active-jobs", "3"])
    key = made.stdout.strip()
    entry = yaml.safe_load(file.read_text())[0]
    assert key not in file.read_text()
    assert entry == {"owner": "ann", "sha256": hashlib.sha256(key.encode()).hexdigest(), "max_active_jobs": 3}
    assert file.stat().st_mode & 0o077 == 0
    CliRunner().invoke(config, ["key", "bob", "--file", str(file)])
    assert [e["owner"] for e in yaml.safe_load(file.read_text())] == ["ann", "bob"]


@pytest.mark.parametrize(
    ("host", "args", "refused"),
    [
        ("127.0.0.1", {}, False),
        ("localhost", {}, False),
        ("0.0.0.0", {}, True),
        ("10.0.0.5", {}, True),
        ("0.0.0.0", {"auth": {"open": True}}, False),
        ("0.0.0.0", {"auth": {"keys_file": "keys.yaml"}}, False),
        (None, {}, False),
    ],
)
def test_a_public_address_without_keys_is_refused(host, args, refused):
    auth = AppArgs(**args).auth
    if refused:
        with pytest.raises(OptionError, match="no API keys"):
            refuse_to_be_open(auth, host)
    else:
        refuse_to_be_open(auth, host)
