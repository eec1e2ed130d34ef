"""Cancelling: the job is over at once, whoever works on it stops when it can, and the log says so in one line."""

import asyncio
import logging


class Kept(logging.Handler):
    """The records of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


async def test_a_job_is_cancelled_before_its_worker_listens_and_the_next_one_waits_for_that(fresh, tmp_path):
    """A step of three seconds that does not ask whether it is wanted: a solver in C, or a busy machine."""
    deaf, after = tmp_path / "deaf", tmp_path / "after"
    deaf.mkdir()
    after.mkdir()
    async with fresh(slots={"nvdiffrec": 2}) as running:
        job_id = (await running.submit(wait=None, optimise_s=3, steps=1, scratch=str(deaf))).json()["id"]
        while not (deaf / "start").exists():
            await asyncio.sleep(0.02)
        other = await running.submit(wait=None, options={"seed": 1}, scratch=str(after))
        answer = await running.http.post(f"/v1/reconstructions/{job_id}/cancel")
        assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
        assert (await running.events(job_id))[-1][1:] == ("done", {"state": "cancelled"})
        assert not (deaf / "step").exists()  # it works still
        await running.until(other.json()["id"], "succeeded")
    ended, began = (
        float((folder / mark).read_text().split()[0]) for folder, mark in ((deaf, "step"), (after, "start"))
    )
    assert ended <= began


async def test_a_cancelled_job_is_one_line_in_the_log(fresh, tmp_path):
    handlers = {"dbos": Kept(), "ray.serve": Kept()}
    async with fresh() as running:
        answer = await running.submit(wait=None, optimise_s=60, steps=600, scratch=str(tmp_path))
        job_id = answer.json()["id"]
        while not (tmp_path / "step").exists():
            await asyncio.sleep(0.02)
        for name, handler in handlers.items():
            logging.getLogger(name).addHandler(handler)
        try:
            await running.http.post(f"/v1/reconstructions/{job_id}/cancel")
            while not (
                told := [record for record in handlers["ray.serve"].records if "workflow" in record.getMessage()]
            ):
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
        finally:
            for name, handler in handlers.items():
                logging.getLogger(name).removeHandler(handler)
    (record,) = told
    assert record.getMessage() == "the workflow was cancelled"
    assert vars(record)["reconstruction_id"] == job_id
    assert handlers["dbos"].records == []
    assert not any(record.exc_info for record in handlers["ray.serve"].records)
