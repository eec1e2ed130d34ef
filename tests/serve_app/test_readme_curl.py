"""The README's lines with curl do what they say, in their order, on a real port."""

import asyncio
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import uvicorn
from in_process import Running

from deployments.fakes import tiny_png
from serve_app.ingress import free_port

README = Path(__file__).parents[2] / "README.md"
LINES = re.findall(r"^curl .*$", README.read_text(), re.MULTILINE)

pytestmark = [
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing: apt-get install curl"),
    pytest.mark.asyncio(loop_scope="module"),
]


async def test_from_a_zip_to_a_mesh_and_another_format(running: Running, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "views.zip", "w") as packed:
        packed.writestr("views/view_00.png", tiny_png())
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(running.service.asgi(), port=port, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.02)

    async def typed(line: str, job_id: str = "") -> bytes:
        line = line.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("/ID", f"/{job_id}")
        shell = await asyncio.create_subprocess_shell(f"{line} --fail -s", stdout=-1, cwd=tmp_path)
        said, _ = await shell.communicate()
        assert shell.returncode == 0, line
        return said

    submit, status, download, export = (line.partition("  #")[0] for line in LINES)
    job = json.loads(await typed(submit))
    await running.until(job["id"], "succeeded")
    assert json.loads(await typed(status, job["id"]))["options"]["preset"] == "standard"
    await typed(download, job["id"])
    assert (tmp_path / "mesh.glb").stat().st_size > 0
    exported = json.loads(await typed(export, job["id"]))
    made = await running.until(exported["id"], "succeeded")
    assert {artifact["name"] for artifact in made["artifacts"]} >= {"mesh.stl", "mesh.usdz"}
    server.should_exit = True
    await serving
