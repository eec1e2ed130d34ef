"""Webhooks and image_urls: the signature, the retries, and which addresses are never called."""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import ClassVar

import httpcore
import pytest

from deployments.fakes import fake_view
from serve_app import outbound, webhooks
from serve_app.auth import KeyRing
from serve_app.settings import AppArgs, Limits
from viewmesh.errors import OptionError

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()


class Receiver(BaseHTTPRequestHandler):
    answers: ClassVar[list[int]] = []
    seen: ClassVar[list[tuple[dict, bytes]]] = []
    over: ClassVar[Event] = Event()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append(({k.lower(): v for k, v in self.headers.items()}, body))
        self.send_response(500 if self.path == "/dead" else self.answers.pop(0) if self.answers else 204)
        self.end_headers()

    def do_GET(self):
        if self.path == "/silent":
            self.over.wait(3)
        body = fake_view(0 if self.path.endswith("0.png") else 1)
        self.send_response(302 if "moved" in self.path else 200)
        self.send_header("location", "http://127.0.0.1:1/")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def receiver():
    Receiver.answers, Receiver.seen, Receiver.over = [], [], Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    Receiver.over.set()
    server.shutdown()
    server.server_close()


async def test_a_webhook_is_signed_and_tried_again(fresh, receiver, monkeypatch):
    monkeypatch.setattr("serve_app.conductor.PAUSES_S", (0, 0.1, 0.1))
    Receiver.answers[:] = [500]
    attempts = []

    async def deliver(*args):
        attempts.append(args)
        if len(attempts) == 1:
            raise TypeError("not foreseen")
        return await webhooks.deliver(*args)

    monkeypatch.setattr("serve_app.conductor.deliver", deliver)
    async with fresh(outbound={"webhook_secret": SECRET, "private_addresses": True}) as running:
        job = (await running.submit(webhook_url=f"{receiver}/hook")).json()
        for _ in range(100):
            if len(Receiver.seen) == 2:
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.3)
    assert len(Receiver.seen) == 2
    (first, body), (second, again) = Receiver.seen
    assert body == again
    assert first["webhook-id"] == second["webhook-id"]
    signed = f"{second['webhook-id']}.{second['webhook-timestamp']}.".encode() + again
    digest = hmac.new(b"0123456789abcdef01234567", signed, hashlib.sha256).digest()
    assert second["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    message = json.loads(body)
    assert (message["type"], message["data"]["id"]) == ("reconstruction.succeeded", job["id"])
    assert {a["name"] for a in message["data"]["artifacts"]} >= {"mesh.glb"}


async def test_receivers_that_are_away_keep_nobody_elses_webhooks_waiting(fresh, receiver, monkeypatch):
    monkeypatch.setattr("serve_app.conductor.PAUSES_S", (0, 60))
    monkeypatch.setattr("serve_app.conductor.DELIVERIES_AT_ONCE", 2)
    async with fresh(outbound={"webhook_secret": SECRET, "private_addresses": True}) as running:
        for seed in range(20):  # more than DBOS would run at once if it were asked for 16
            job = await running.submit(wait=None, optimise_s=30, options={"seed": seed}, webhook_url=f"{receiver}/dead")
            await running.http.post(f"/v1/reconstructions/{job.json()['id']}/cancel")
        job = await running.submit(webhook_url=f"{receiver}/good")
        for _ in range(200):
            if any(job.json()["id"].encode() in body for _, body in Receiver.seen):
                break
            await asyncio.sleep(0.1)
    told = [json.loads(body)["data"]["id"] for _, body in Receiver.seen]
    assert told.count(job.json()["id"]) == 1
    assert len(told) == len(set(told)) == 21


async def test_a_cancelled_job_tells_its_webhook_too(fresh, receiver):
    async with fresh(outbound={"webhook_secret": SECRET, "private_addresses": True}) as running:
        job_id = (await running.submit(wait=None, optimise_s=30, webhook_url=f"{receiver}/hook")).json()["id"]
        await running.http.post(f"/v1/reconstructions/{job_id}/cancel")
        for _ in range(60):
            if Receiver.seen:
                break
            await asyncio.sleep(0.1)
    assert json.loads(Receiver.seen[0][1])["type"] == "reconstruction.cancelled"


async def test_image_urls_are_fetched_where_that_is_allowed(fresh, receiver):
    async with fresh(outbound={"image_urls": True, "private_addresses": True}) as running:
        body = {"image_urls": [f"{receiver}/0.png", f"{receiver}/1.png"], "options": {"seed": 9}}
        job = (await running.http.post("/v1/reconstructions", json=body, headers={"prefer": "wait=20"})).json()
        assert (job["state"], job["report"]["views"], job["options"]["seed"]) == ("succeeded", 2, 9)
        moved = await running.http.post("/v1/reconstructions", json={"image_urls": [f"{receiver}/moved.png"]})
        assert (moved.status_code, moved.json()["code"]) == (422, "image_url_failed")


async def test_what_is_fetched_counts_as_if_it_had_been_sent(fresh, receiver):
    body = {"image_urls": [f"{receiver}/0.png", f"{receiver}/1.png"]}
    silent = {"image_urls": [f"{receiver}/silent"]}
    small = len(json.dumps(body)) + len(fake_view(0)) + 1
    async with fresh(outbound={"image_urls": True, "private_addresses": True}) as running:
        for limits, sent, codes in (
            (Limits(files=1), body, {"too_large"}),
            (Limits(total_bytes=small), body, {"too_large"}),
            (Limits(upload_timeout_s=0.3), silent, {"image_url_failed", "request_timeout"}),
        ):
            running.service.config.limits = limits
            answer = await running.http.post("/v1/reconstructions", json=sent)
            assert answer.json().get("code") in codes, answer.text


async def test_private_image_urls_are_refused(fresh, receiver):
    async with fresh(outbound={"image_urls": True}) as running:
        for url in (f"{receiver}/0.png", "https://127.0.0.1/0.png", "https://localhost/0.png", "file:///etc/passwd"):
            answer = await running.http.post("/v1/reconstructions", json={"image_urls": [url]})
            assert (answer.status_code, answer.json()["code"]) == (422, "address_refused"), url
    assert not Receiver.seen


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/", "https://user:password@example.com/", "https://example.com:22/", "https:///x", "gopher://x/",
        "https://10.0.0.1/", "https://192.168.1.1/", "https://172.16.0.1/", "https://169.254.169.254/latest/meta-data",
        "https://0.0.0.0/", "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://[fe80::1]/", "https://[fd00::1]/",
        "https://100.64.0.1/", "https://224.0.0.1/", "https://metadata.google.internal/", "https://[64:ff9b::7f00:1]/",
        "https://x:99999/", "https://printer.local/", "https://example.com/ä.png", "https://bücher.example/hook",
        "https://example.com/a b", "https://example.com/\0", "https://example.com/\ud800",
    ],
)  # fmt: skip
def test_addresses_that_are_never_called(url):
    with pytest.raises(outbound.Refused):
        outbound.check_url(url, private_addresses=False)


def test_public_addresses_may_be_called():
    outbound.check_url("https://example.com/a.png?b=1", private_addresses=False)
    assert outbound.is_public(ipaddress.ip_address("93.184.216.34"))
    assert outbound.is_public(ipaddress.ip_address("2606:2800:220:1::1"))


@pytest.mark.parametrize("answers", [["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::1"], ["169.254.169.254"]])
async def test_a_name_is_judged_by_what_it_resolves_to(monkeypatch, answers):
    loop = asyncio.get_running_loop()

    async def resolve(host, port, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers]

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    with pytest.raises(outbound.Refused, match="not public"):
        await outbound.request("GET", "https://harmless.example/")


async def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch):
    loop, asked, connected = asyncio.get_running_loop(), [], []

    async def resolve(host, port, **kwargs):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]

    async def connect(self, host, *args, **kwargs):
        connected.append(host)
        raise httpcore.ConnectError("enough")

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    with pytest.raises(httpcore.ConnectError):
        await outbound.request("GET", "https://harmless.example/")
    assert (asked, connected) == (["harmless.example"], ["93.184.216.34"])


def test_the_signature_of_the_standards_example():
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = b'{"test": 2432232314}'
    signature = webhooks.sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("secret", ["hello", "whsec_hello", "my secret!", "whsec_bücher"])
def test_a_secret_that_cannot_sign_is_refused_before_it_is_needed(tmp_path, secret):
    with pytest.raises(ValueError, match="whsec_ and base64") as raised:
        AppArgs.model_validate({"outbound": {"webhook_secret": secret}})
    assert secret not in str(raised.value)
    file = tmp_path / "keys.yaml"
    file.write_text(json.dumps([{"owner": "ann", "sha256": "0" * 64, "webhook_secret": secret}]))
    with pytest.raises(OptionError, match="whsec_ and base64") as refused:
        KeyRing(file)
    assert secret not in str(refused.value)
