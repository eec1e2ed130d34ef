"""The web page in a real Chromium, over real HTTP: what a person does there, by mouse, by keyboard and on a phone."""

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import uvicorn
from in_process import Running

from deployments.fakes import fake_view, tiny_png
from serve_app.replicas import Seen
from viewmesh.weights.ready import Readiness

playwright = pytest.importorskip("playwright.async_api", reason="playwright is missing: pip install 'viewmesh[dev]'")
NAMES = ("chromium", "google-chrome")
CHROMIUM = next(filter(None, (os.environ.get("VIEWMESH_CHROMIUM"), *map(shutil.which, NAMES))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: apt-get install chromium, or VIEWMESH_CHROMIUM"),
    pytest.mark.asyncio(loop_scope="module"),
]

WATCH = "addEventListener('securitypolicyviolation', e => console.error('CSP: ' + e.violatedDirective + e.blockedURI))"


class Site:
    """Opens the page; what a page asks for elsewhere, or complains of, is a failure at the end of its test."""

    def __init__(self, browser, url: str) -> None:
        self.browser, self.url = browser, url
        self.complaints: list[str] = []
        self.deleting = False  # what is asked for beside a deletion may be gone when it is answered
        self.pages = []

    async def open(self, at: str = "/", **context):
        opened = await self.browser.new_context(reduced_motion="reduce", **context)
        self.pages.append(opened)
        page = await opened.new_page()
        page.set_default_timeout(15_000)
        await page.add_init_script(WATCH)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and self._complained(said))
        page.on("request", lambda asked: self._asked(asked.url))
        await page.goto(self.url + at)
        return page

    def _complained(self, said) -> None:
        where = said.location["url"]
        gone = self.deleting or "/preview.png" in where  # a preview goes when its job ends
        if not (gone and "404 (Not Found)" in said.text):
            self.complaints.append(f"{said.text} {where}")

    def _asked(self, url: str) -> None:
        if not url.startswith((self.url + "/", f"blob:{self.url}/", "data:")):
            self.complaints.append(f"asked for {url}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(running: Running) -> AsyncIterator[tuple]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(running.service.asgi(), port=port, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    async with playwright.async_playwright() as driver:
        chromium = await driver.chromium.launch(executable_path=CHROMIUM, args=["--enable-unsafe-swiftshader"])
        yield chromium, f"http://127.0.0.1:{port}"
        await chromium.close()
    server.should_exit = True
    await serving


@pytest_asyncio.fixture(loop_scope="module")
async def site(browser) -> AsyncIterator[Site]:
    made = Site(*browser)
    yield made
    for context in made.pages:
        await context.close()
    assert made.complaints == []


def pictures(folder: Path, **script) -> list[Path]:
    """Three views; the first tells the fake engines what to do."""
    files = [folder / f"view_{i:02d}.png" for i in range(3)]
    for i, file in enumerate(files):
        file.write_bytes(fake_view(0, **script) if i == 0 and script else tiny_png() + bytes([i]))
    return files


async def submit(page, files: list[Path]) -> None:
    await page.set_input_files("#files", files)
    await page.click("#go")


async def until(page, condition: str, seconds: float = 15) -> None:
    """Playwright's wait_for_function is an eval inside the page, which the page's policy forbids."""
    for _ in range(int(seconds / 0.05)):
        if await page.evaluate(f"Boolean({condition})"):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"never: {condition}\n{await page.inner_text('main')}")


async def over(page, state: str) -> None:
    await until(page, f"document.querySelector('#state').dataset.state === '{state}'")


async def test_from_pictures_to_a_mesh_that_turns_and_files(site: Site, tmp_path):
    page = await site.open()
    assert await page.is_disabled("#go")
    await page.set_input_files("#files", pictures(tmp_path))
    assert await page.locator("#thumbs img").count() == 3
    assert await page.evaluate("[...document.querySelectorAll('#thumbs img')].every(i => i.decode().then(() => true))")
    await submit(page, pictures(tmp_path))
    await over(page, "succeeded")
    assert (await page.inner_text("#status")).startswith("nvdiffrec, because ")
    await page.wait_for_selector("#viewer[data-drawn=yes]:visible")
    assert await page.locator("#facts dt").first.inner_text() == "faces"
    for name in ("mesh.glb", "mesh.obj", "mesh.ply", "report.json", "thumbnail.png"):
        async with page.expect_download() as started:
            await page.click(f"#downloads a[download='{name}']")
        assert (await (await started.value).path()).stat().st_size > 0
    assert "succeeded" in await page.inner_text("#list li:first-child")
    await until(page, "document.querySelector('#list img').naturalWidth > 0")


async def test_with_an_api_key_files_are_fetched_because_links_cannot_carry_it(site: Site, tmp_path):
    page = await site.open()
    await page.click("#form summary")
    await page.fill("#form input[name=key]", "a-key")
    asked = []
    page.on("request", lambda request: asked.append((request.url, request.headers.get("authorization"))))
    await submit(page, pictures(tmp_path))
    await over(page, "succeeded")
    await until(page, "document.querySelector('#list img').src.startsWith('blob:')")
    async with page.expect_download() as started:
        await page.click("#downloads a[download='mesh.ply']")
    assert (await (await started.value).path()).read_bytes() == b"# a fake ply\n"
    assert {key for url, key in asked if "/v1/" in url} == {"Bearer a-key"}, asked


async def test_another_export_and_deleting_it(site: Site, tmp_path):
    page = await site.open()
    await submit(page, pictures(tmp_path))
    await over(page, "succeeded")
    first = page.url
    await page.uncheck("#export .formats input[value=glb]")
    await page.check("#export .formats input[value=stl]")
    await page.click("#export button")
    await until(page, f"location.href !== {first!r} && location.hash")
    await over(page, "succeeded")
    assert "export of nvdiffrec" in await page.inner_text("#status")
    await page.wait_for_selector("#downloads a[download='mesh.stl']")
    assert await page.locator("#downloads a[download='mesh.glb']").count() == 0
    rows = await page.locator("#list li").count()
    await page.click("#remove")
    assert await page.inner_text("#remove") == "Delete for good?"
    site.deleting = True
    await page.click("#remove")
    await page.wait_for_selector("#job", state="hidden")
    await until(page, f"document.querySelectorAll('#list li').length === {rows - 1}")
    await page.go_back()
    await over(page, "succeeded")


async def test_a_running_job_shows_the_mesh_so_far(site: Site, tmp_path):
    page = await site.open()
    await submit(page, pictures(tmp_path, finish_s=60.0))  # previews come with the end of a slice, and go with the job
    await until(page, "document.querySelector('#picture').naturalWidth > 0")
    assert await page.is_visible("#picture")
    await page.click("#cancel")
    await over(page, "cancelled")


async def test_progress_and_cancelling(site: Site, tmp_path):
    page = await site.open()
    await submit(page, pictures(tmp_path, optimise_s=60.0))
    await until(page, "document.querySelector('#detail').textContent.includes('left in this stage')")
    detail = await page.inner_text("#detail")
    for word in ("optimise", "of 40", "%", "loss", "PSNR"):
        assert word in detail
    assert 0 < await page.evaluate("document.querySelector('#bar').value") < 90
    again = await site.open("/#" + page.url.partition("#")[2])  # the address of a job is a link to it
    await until(again, "document.querySelector('#detail').textContent.includes('optimise')")
    await page.click("#cancel")
    await over(page, "cancelled")
    await over(again, "cancelled")
    assert await page.is_hidden("#cancel")


async def test_what_is_wrong_is_a_sentence(site: Site, tmp_path):
    page = await site.open()
    for name in ("a.zip", "b.zip"):
        (tmp_path / name).write_bytes(b"no zip")
    await submit(page, [tmp_path / "a.zip", tmp_path / "b.zip"])
    await until(page, "document.querySelector('#form-error').textContent")
    assert await page.inner_text("#form-error") == "There must be one archive file, not 2."
    assert "status of 422" in site.complaints.pop()  # the browser's own word on it
    await submit(page, [tmp_path / "a.zip"])
    await over(page, "failed")
    said = await page.inner_text("#job-error")
    assert said == "archive.zip: is not a zip file Send a zip, or the files one by one."
    assert await page.inner_text("#form-error") == ""


async def test_a_model_that_is_starting_can_be_chosen_and_is_asked_after(site: Site, running: Running, monkeypatch):
    state = Seen("UPDATING", 0).readiness()

    async def readiness(_) -> Readiness:
        return state

    monkeypatch.setattr(running.service.replicas, "readiness", readiness)
    page = await site.open()
    await until(page, "document.querySelectorAll('#model option').length === 4")
    options = {await one.get_attribute("value"): one for one in await page.locator("#model option").all()}
    assert await options["nvdiffrec"].inner_text() == "nvdiffrec (starting)"
    assert await options["nvdiffrec"].is_enabled()
    assert await options["trellis"].is_disabled()
    note = await page.inner_text("#model-note")
    assert state.reason in note
    assert "trellis: The weights of trellis are not installed. viewmesh weights download trellis" in note
    await page.select_option("#model", "nvdiffrec")
    assert state.reason in await page.inner_text("#model-note")
    state = Readiness(True)
    await until(page, "document.querySelector('#model').selectedOptions[0].textContent === 'nvdiffrec'")
    assert "starting" not in await page.inner_text("#model-note")


async def test_by_keyboard(site: Site, tmp_path):
    page = await site.open()
    await page.set_input_files("#files", pictures(tmp_path))
    seen = []
    for _ in range(16):
        await page.keyboard.press("Tab")
        seen.append(await page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", seen
        if seen[-1] == "go":
            break
    assert seen[-1] == "go"
    assert [name for name in seen if name in ("files", "model")] == ["files", "model"]
    await page.keyboard.press("Enter")
    await over(page, "succeeded")
    assert await page.evaluate("document.activeElement.id") == "job-title"
    await page.wait_for_selector("#viewer[data-drawn=yes]:visible")
    await page.focus("#viewer")
    before = await page.evaluate("viewer.turn")
    await page.keyboard.press("ArrowLeft")
    assert await page.evaluate("viewer.turn") > before
    await page.click("#close")
    await page.focus("#list li:first-child button")
    await page.keyboard.press("Enter")
    await over(page, "succeeded")


async def test_on_a_phone(site: Site, tmp_path):
    page = await site.open(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    await submit(page, pictures(tmp_path))
    await over(page, "succeeded")
    await page.wait_for_selector("#viewer[data-drawn=yes]:visible")
    for summary in await page.locator("summary").all():
        await summary.click()
    assert await page.evaluate("document.documentElement.scrollWidth") == 360
    small = await page.evaluate(
        "[...document.querySelectorAll('button, select, #downloads a')].filter(e => e.checkVisibility())"
        ".filter(e => e.getBoundingClientRect().height < 28).map(e => e.textContent)"
    )
    assert small == []


async def test_the_reader_of_the_api(site: Site):
    page = await site.open("/docs")
    await until(page, "document.querySelectorAll('#routes section').length > 10")
    assert "/v1/reconstructions/{job_id}/artifacts/{name}" in await page.inner_text("#routes")
