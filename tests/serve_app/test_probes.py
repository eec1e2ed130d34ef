"""What a load balancer and Prometheus ask: /livez, /readyz, /metrics."""

import asyncio
import threading

import pytest
from in_process import Running

from serve_app.probes import Probes

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("stores")]


async def test_a_store_that_hangs_holds_one_thread_however_often_it_is_asked_for(running: Running, monkeypatch):
    let_go, asked = threading.Event(), []

    def hang() -> None:
        asked.append(True)
        let_go.wait(30)

    monkeypatch.setattr("serve_app.probes.PATIENCE_S", 0.2)
    monkeypatch.setattr("serve_app.probes.FRESH_S", 0.0)
    service, before = running.service, running.service.probes
    service.probes = Probes({"database": service.store.ping, "artifacts": hang})
    try:
        for _ in range(3):
            answers = await asyncio.gather(*(running.http.get("/readyz") for _ in range(40)))
            assert {answer.json()["checks"]["artifacts"] for answer in answers} == {"TimeoutError"}
            assert {answer.json()["checks"]["database"] for answer in answers} == {"ok"}
        assert len(asked) == 1
        assert (await running.http.get("/v1/reconstructions")).status_code == 200
        let_go.set()
        while (await running.http.get("/readyz")).json()["checks"]["artifacts"] != "ok":
            await asyncio.sleep(0.02)
    finally:
        let_go.set()
        service.probes.close()
        service.probes = before


async def test_probes_and_metrics(running: Running):
    from prometheus_client.parser import text_string_to_metric_families

    assert (await running.http.get("/livez")).json()["status"] == "ok"
    ready = (await running.http.get("/readyz")).json()
    assert ready["checks"] == {"database": "ok", "artifacts": "ok", "conductor": "ok"}
    await running.submit()
    answer = await running.http.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert families["viewmesh_jobs"].type == "counter"
    ended = {s.labels["outcome"]: s.value for s in families["viewmesh_jobs"].samples if s.labels["code"] == ""}
    assert ended["succeeded"] >= 1
    stages = {s.labels["stage"] for s in families["viewmesh_stage_duration_seconds"].samples}
    assert {"prepare", "optimise", "finish", "export"} <= stages
    assert not any("job_id" in s.labels for family in families.values() for s in family.samples)
