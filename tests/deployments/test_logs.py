"""What stands in a replica's log: each line about a job has its id and the request's, through Serve's own formatter."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.serve import context
from ray.serve._private.common import ServeComponentType
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig

from deployments import fakes
from deployments.exporter import Exporter
from deployments.messages import Done, Failed
from viewmesh.options import Options


@pytest.fixture
def lines(tmp_path) -> Iterator[Callable[[], list[dict]]]:
    """Serve's logger as in a replica, with JSON into a file: what it holds so far."""
    logger = logging.getLogger("ray.serve")
    before = logger.handlers[:], logger.level, logger.propagate
    configure_component_logger(
        component_name="viewmesh_Exporter",
        component_id="r1",
        component_type=ServeComponentType.REPLICA,
        logging_config=LoggingConfig(encoding="JSON", logs_dir=str(tmp_path / "logs")),
        max_bytes=10**6,
        backup_count=1,
    )

    def read() -> list[dict]:
        for handler in logger.handlers:
            handler.flush()
        (file,) = Path(tmp_path / "logs").iterdir()
        return [json.loads(line) for line in file.read_text().splitlines()]

    token = context._serve_request_context.set(context._RequestContext(request_id="req-1"))
    try:
        yield read
    finally:
        context._serve_request_context.reset(token)
        for handler in set(logger.handlers) - set(before[0]):
            handler.close()
        logger.handlers[:], logger.level, logger.propagate = before


async def export(tmp_path, **script) -> Done | Failed:
    exporter = Exporter.func_or_class(f"file://{tmp_path}/store", "deployments.fakes:FakeWriter", {})
    result = exporter.store.put_bytes(fakes.Script(at="export", **script).model_dump_json().encode(), "jobs/a/result")
    call = {"job_id": "a", "options": Options().model_dump(mode="json"), "result": result.json(), "facts": {}}
    return [message async for message in exporter.export(call)][-1]


async def test_a_call_leaves_one_line_with_the_ids_of_job_and_request(tmp_path, lines):
    assert isinstance(await export(tmp_path), Done)
    (line,) = (line for line in lines() if "reconstruction_id" in line)
    assert (line["reconstruction_id"], line["request_id"], line["deployment"]) == ("a", "req-1", "viewmesh_Exporter")
    assert line["message"].startswith("a call of export: done after ")
    assert line["levelname"] == "INFO"


async def test_a_traceback_from_the_thread_has_them_too(tmp_path, lines):
    assert isinstance(await export(tmp_path, fail="internal_error"), Failed)
    found = [line for line in lines() if "exc_text" in line]
    assert len(found) == 1
    assert "ZeroDivisionError" in found[0]["exc_text"]
    assert (found[0]["reconstruction_id"], found[0]["request_id"]) == ("a", "req-1")
