"""Uploads: what is taken, what is refused, and that nothing a client sends is a 500 or leaves a file behind."""

import asyncio
import io
import json
import threading
import time
import zipfile

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from in_process import Running, views

from deployments.artifacts import ArtifactStore, Ref
from deployments.fakes import fake_view
from serve_app.problems import ProblemError
from serve_app.settings import Limits
from serve_app.uploads import SPILL_BYTES, File, _Part, named
from viewmesh.views.find import matched, natural

pytestmark = pytest.mark.asyncio(loop_scope="module")
URL = "/v1/reconstructions"
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def archive(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return out.getvalue()


def leftovers(running: Running) -> list:
    return list((running.data / "artifacts" / "tmp").glob("*.part"))


async def test_a_zip_passes_through_in_a_field_or_as_the_body(running: Running):
    data = archive(**{f"views/view_{i:02d}.png": fake_view(i) for i in range(4)})
    for answer in (
        await running.http.post(URL, files={"archive": ("a.zip", data)}, headers={"prefer": "wait=20"}),
        await running.http.post(
            URL,
            content=data,
            params={"options": '{"seed": 3}'},
            headers={"prefer": "wait=20", "content-type": "application/zip"},
        ),
    ):
        assert answer.json()["report"]["views"] == 4
    assert answer.json()["options"]["seed"] == 3


async def test_what_is_no_zip_fails_as_a_job_that_says_so(running: Running):
    answer = await running.http.post(URL, files={"archive": ("a.zip", b"no")}, headers={"prefer": "wait=20"})
    assert answer.json()["error"]["code"] == "invalid_input"


@pytest.mark.parametrize(
    ("files", "data", "status", "code"),
    [
        ([], {"options": "{}"}, 415, "unsupported_media_type"),
        (views(65), {}, 422, "invalid_request"),
        ([*views(1), ("archive", ("a.zip", b"PK"))], {}, 422, "invalid_request"),
        ([("cameras", ("cameras.json", b"{}"))], {}, 422, "invalid_request"),
        ([*views(1), ("cameras", ("a", b"{}")), ("cameras", ("b", b"{}"))], {}, 422, "invalid_request"),
        ([*views(1), ("masks", ("a.png", b"1")), ("masks", ("b.png", b"2"))], {}, 422, "invalid_request"),
        ([("views", ("a.png", b""))], {}, 422, "empty_file"),
        ([("virus", ("a.png", b"1"))], {}, 422, "unknown_field"),
        (views(1), {"options": "{"}, 422, "invalid_option"),
        (views(1), {"options": '{"colour": 1}'}, 422, "invalid_option"),
        (views(1), {"options": '{"texture_size": 1000}'}, 422, "invalid_option"),
        (views(1), {"options": '{"views": {"mask": "magic"}}'}, 422, "invalid_option"),
        (views(1), {"image_urls": '["https://example.com/a.png"]'}, 422, "image_urls_disabled"),
        (views(1), {"webhook_url": "https://example.com/hook"}, 422, "webhooks_disabled"),
    ],
)
async def test_what_is_refused_at_once(running: Running, files, data, status, code):
    answer = await running.http.post(URL, files=files or None, data=data)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert not leftovers(running)


async def test_an_options_error_points_at_the_option(running: Running):
    answer = await running.http.post(URL, files=views(1), data={"options": '{"views": {"mask": "magic"}}'})
    assert answer.json()["errors"][0]["pointer"] == "/options/views/mask"


async def test_budgets_are_enforced_while_streaming(running: Running):
    sent = 0

    async def endless():
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="views"; filename="a.png"\r\n\r\n'
        while True:
            sent += 65536
            yield b"\0" * 65536

    running.service.config.limits = Limits(file_bytes=1_000_000, total_bytes=2_000_000)
    try:
        answer = await running.http.post(
            URL, content=endless(), headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert sent < 1_300_000
        announced = await running.http.post(URL, content=b"x", headers={"content-length": "2000001"})
        assert announced.status_code == 413
        many = await running.http.post(URL, files=[("views", (f"{i}.png", b"\0" * 900_000)) for i in range(3)])
        assert many.status_code == 413
    finally:
        running.service.config.limits = Limits(wait_s=30)
    assert not leftovers(running)


async def test_a_body_that_dribbles_is_given_up(running: Running):
    async def slow():
        yield b'--x\r\nContent-Disposition: form-data; name="views"; filename="a.png"\r\n\r\n'
        await asyncio.sleep(30)
        yield b"never"

    running.service.config.limits = Limits(read_timeout_s=0.2)
    try:
        answer = await running.http.post(
            URL, content=slow(), headers={"content-type": "multipart/form-data; boundary=x"}
        )
    finally:
        running.service.config.limits = Limits(wait_s=30)
    assert (answer.status_code, answer.json()["code"]) == (408, "request_timeout")
    assert not leftovers(running)


async def test_uploads_to_a_store_that_hangs_keep_no_query_waiting(running: Running, monkeypatch):
    let_go, putting, put = threading.Event(), [], running.service.artifacts.put

    def hang(*args, **kwargs):
        putting.append(True)
        let_go.wait(30)
        return put(*args, **kwargs)

    monkeypatch.setattr(running.service.artifacts, "put", hang)
    uploads = [asyncio.create_task(running.submit(wait=None)) for _ in range(12)]  # of three files each
    try:
        while len(putting) < 32:  # all the threads that there are
            await asyncio.sleep(0.02)
        listed = await asyncio.wait_for(running.http.get(URL), 10)
        assert listed.status_code == 200
        assert not any(task.done() for task in uploads)
    finally:
        let_go.set()
    assert {answer.status_code for answer in await asyncio.gather(*uploads)} == {202}


async def test_a_small_body_is_enough_for_every_other_route(running: Running):
    answer = await running.http.post(f"{URL}/x/exports", content=b" " * (Limits().field_bytes + 1))
    assert answer.status_code == 413


async def test_equal_files_are_stored_once(running: Running):
    a = (await running.http.post(URL, files=views(2), headers={"prefer": "wait=20"})).json()
    b = (await running.http.post(URL, files=views(2), headers={"prefer": "wait=20"})).json()
    inputs = [running.service.store.get(job["id"])["inputs"] for job in (a, b)]
    assert inputs[0] == inputs[1]


ref = Ref("inputs/00/0", "0" * 64, 1)


def files(field: str, *names: str) -> list[File]:
    return [File(field, name, ref) for name in names]


@pytest.mark.parametrize("step", [_Part.spill, _Part.commit])
async def test_an_upload_that_is_given_up_while_it_is_written_leaves_no_file(tmp_path, monkeypatch, step):
    store = ArtifactStore(tmp_path.as_uri())
    opening = store.spool
    monkeypatch.setattr(store, "spool", lambda: (time.sleep(0.3), opening())[1])
    part = _Part("views", "front.png", store, Limits())
    part.add(b"x" * 2 * SPILL_BYTES)
    task = asyncio.create_task(step(part))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    part.discard()
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("given", "masks", "expected"),
    [
        ("img_7.png img_3.png", "m3.png m7.png", "m7.png m3.png"),
        ("img_7.png img_3.png", "m_03.png m_07.png", "m_07.png m_03.png"),
        ("left.png back.JPG", "back_mask.png left_mask.png", "left_mask.png back_mask.png"),
        ("left.png back.JPG", "x.png y.png", "x.png y.png"),  # from here on, as they were sent
        ("left.png back.png", "blob blob", "blob blob"),
        ("blob blob", "y.png x.png", "y.png x.png"),
        ("a.png a.jpg", "y.png x.png", "y.png x.png"),
        ("f10_1.png f9_1.png", "x.png y.png", "x.png y.png"),
        ("view_01.png view_00.png", "blob blob", "blob blob"),
    ],
)
async def test_the_library_finds_each_views_mask(given: str, masks: str, expected: str):
    def sent(field: str, names: str) -> list[File]:
        return [File(field, name, Ref(f"{field}/{i}/{name}", "0" * 64, 1)) for i, name in enumerate(names.split())]

    views, of_masks = sent("views", given), sent("masks", masks)
    found = named([*views, *of_masks])
    in_folder = [sorted((n for n in found if n.startswith(f)), key=natural) for f in ("views/", "masks/")]
    pairs = dict(zip(in_folder[0], matched(tuple(in_folder[0]), tuple(in_folder[1]), "mask"), strict=True))
    of_view = {found[view].key: found[mask] for view, mask in pairs.items()}
    order = of_masks if expected == masks else [of_masks[masks.split().index(name)] for name in expected.split()]
    assert of_view == {view.ref.key: mask.ref for view, mask in zip(views, order, strict=True)}


async def test_files_keep_the_names_that_a_camera_file_may_say():
    sent = [
        *files("views", "a 1.png", "a 2.JPG"),
        *files("masks", "a 1.png", "a 2.png"),
        *files("depth", "d2.png", "d1"),
    ]
    assert set(named(sent)) == {
        "views/a_1.png", "views/a_2.JPG", "masks/a_1.png", "masks/a_2.png", "depth/d2.png", "depth/d1.png",
    }  # fmt: skip


@given(names=st.lists(st.text(max_size=40), min_size=1, max_size=5), masks=st.lists(st.text(max_size=20), max_size=5))
@example(names=["a.png", "a", "b.png"], masks=[])  # a suffix that is added must not make two names one
@FUZZ
async def test_no_file_name_leaves_the_view_set(names: list[str], masks: list[str]):
    try:
        found = named([*files("views", *names), *files("masks", *masks)])
    except ProblemError:
        return
    assert sum(name.startswith("views/") for name in found) == len(names)
    assert sum(name.startswith("masks/") for name in found) == len(masks)
    for name in found:
        folder, _, base = name.partition("/")
        assert folder in ("views", "masks")
        assert "/" not in base
        assert not base.startswith(".")


NAME = st.characters(exclude_characters="\0", exclude_categories=["Cs"])  # what Python's own zip writer can write
MULTIPART = st.one_of(
    st.binary(max_size=400),
    st.lists(
        st.tuples(
            st.sampled_from(
                [b"views", b"masks", b"options", b"archive", b"cameras", b"image_urls", b"webhook_url", b"x", b""]
            ),
            st.sampled_from([b"", b"; filename=a.png", b'; filename="../../etc/passwd"', b"; filename*=UTF-8''%00"]),
            st.binary(max_size=60),
            st.sampled_from([b"\r\n", b"\n", b"", b"\r\n\r\n"]),
        ),
        max_size=5,
    ).map(
        lambda parts: (
            b"".join(
                b"--b\r\nContent-Disposition: form-data; name=" + n + f + b"\r\n\r\n" + d + e for n, f, d, e in parts
            )
            + b"--b--\r\n"
        )
    ),
)


@given(body=MULTIPART, boundary=st.sampled_from(["b", "", "b;b", '"b"', "c" * 100]))
@FUZZ
async def test_no_multipart_body_is_our_fault(running: Running, body: bytes, boundary: str):
    answer = await running.http.post(
        URL, content=body, headers={"content-type": f"multipart/form-data; boundary={boundary}"}
    )
    assert_refused_or_accepted(answer)
    assert not leftovers(running)


@given(
    body=st.one_of(
        st.binary(max_size=100),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=8),
            lambda x: (
                st.lists(x, max_size=3)
                | st.dictionaries(st.sampled_from(["options", "image_urls", "x"]), x, max_size=3)
            ),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
@FUZZ
async def test_no_json_body_is_our_fault(running: Running, body: bytes):
    answer = await running.http.post(URL, content=body, headers={"content-type": "application/json"})
    assert_refused_or_accepted(answer)


@given(
    names=st.lists(st.text(NAME, min_size=1, max_size=30), max_size=4),
    data=st.binary(max_size=50),
    cut=st.integers(0, 60),
)
@FUZZ
async def test_no_zip_is_the_edges_fault(running: Running, names: list[str], data: bytes, cut: int):
    body = archive(**dict.fromkeys(names, data))
    body = body[: len(body) - cut] or b"x"
    answer = await running.http.post(URL, content=body, headers={"content-type": "application/zip"})
    assert_refused_or_accepted(answer)


def assert_refused_or_accepted(answer: httpx.Response) -> None:
    assert answer.status_code == 202 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"]
