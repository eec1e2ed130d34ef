"""Seats: at most so many jobs of a model between their first stage and their files."""

import asyncio
import contextlib
from typing import Any

from in_process import running_service

from serve_app.jobs import JobStore, NewJob, id_of_key
from serve_app.seats import Seats
from serve_app.stages import Calls


def of(count: int) -> Seats:
    made = Seats()
    made.set(lambda model: count)
    return made


async def test_a_seat_that_is_left_goes_to_the_oldest_who_waits():
    seats, got = of(2), []

    async def job(name: str) -> None:
        await seats.take(name, "a", ord(name))
        await seats.take(name, "a", ord(name))  # asking again changes nothing
        got.append(name)

    asking = {name: asyncio.create_task(job(name)) for name in "wvzyx"}
    await asyncio.sleep(0.01)
    assert got == ["w", "v"]
    seats.leave("v")
    seats.leave("v")
    await asyncio.sleep(0.01)
    assert got == ["w", "v", "x"]
    asking["y"].cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking["y"]
    seats.leave("y")  # it never had one
    seats.leave("w")
    await asyncio.wait_for(asking["z"], 1)
    assert set(seats.held) == {"x", "z"}


async def test_seats_are_given_out_from_any_thread():
    """Serve configures the Conductor in another event loop than the one that its jobs run in."""
    asyncio.get_running_loop().set_debug(True)  # which refuses what only the loop's own thread may do
    seats = Seats()
    asking = asyncio.create_task(seats.take("v", "a", 0))
    await asyncio.sleep(0)
    await asyncio.to_thread(seats.set, lambda model: 1)
    await asyncio.wait_for(asking, 5)
    assert seats.held == {"v": "a"}


async def test_the_oldest_is_who_was_accepted_first_whatever_its_id_and_whoever_asks_first(tmp_path):
    nothing: Any = None
    store, seats = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite"), Seats()
    store.create()
    calls = Calls(store, nothing, nothing, nothing, {}, seats, None, nothing)
    ids = [id_of_key("ann", f"key-{i}") for i in range(8)]
    assert ids != sorted(ids)
    for job_id in ids:
        store.accept(NewJob(job_id, "ann", "reconstruction", "nvdiffrec", {}, {}, "h"), lambda *args: None)
    asking = [asyncio.create_task(calls.begin(job_id)) for job_id in reversed(ids)]  # as a new Conductor goes on
    while len(seats.waiting["nvdiffrec"]) < len(ids):
        await asyncio.sleep(0.01)
    seats.set(lambda model: 1)
    for job_id in ids:
        assert set(seats.held) == {job_id}
        seats.leave(job_id)
    await asyncio.gather(*asking)
    store.close()


async def test_a_seat_given_to_a_job_that_is_cancelled_at_that_moment_goes_to_the_next():
    seats = of(1)
    await seats.take("u", "a", 0)
    asking = [asyncio.create_task(seats.take(name, "a", ord(name))) for name in "vw"]
    await asyncio.sleep(0)
    seats.leave("u")  # v has it, and does not know yet
    asking[0].cancel()
    await asyncio.wait_for(asking[1], 1)
    assert seats.held == {"w": "a"}


async def test_more_seats_are_taken_at_once_and_fewer_as_they_are_left():
    seats = Seats()
    asking = [asyncio.create_task(seats.take(name, "a", ord(name))) for name in "uvw"]
    await asyncio.sleep(0.01)
    assert seats.held == {}
    seats.set(lambda model: 2)
    assert set(seats.held) == {"u", "v"}
    seats.set(lambda model: 1)
    seats.leave("u")
    assert set(seats.held) == {"v"}
    seats.leave("v")
    assert set(seats.held) == {"w"}
    await asyncio.gather(*asking)


async def test_a_job_that_goes_on_with_another_model_leaves_its_seat():
    seats = of(1)
    await seats.take("u", "trellis", 0)
    await seats.take("u", "nvdiffrec", 0)
    await asyncio.wait_for(seats.take("v", "trellis", 1), 1)
    assert seats.held == {"u": "nvdiffrec", "v": "trellis"}


async def test_the_next_job_is_worked_on_while_one_writes_its_files(tmp_path):
    async with running_service(tmp_path / "data", slots={"nvdiffrec": 1}) as running:
        marks = tmp_path / "marks"
        marks.mkdir()
        ids = []
        for name in "uv":
            (marks / name).mkdir()
            script = {"optimise_s": 2.0, "steps": 20, "export_s": 6.0, "scratch": str(marks / name)}
            ids.append((await running.submit(wait=None, **script)).json()["id"])
        for job_id in ids:
            await running.until(job_id, "succeeded")

    def at(job: str, mark: str) -> list[float]:
        return [float(line.split()[0]) for line in (marks / job / mark).read_text().splitlines()]

    first, second = sorted("uv", key=lambda job: at(job, "start"))  # both were there when the queue was looked at
    assert at(first, "finish")[0] < at(second, "prepare")[0] < at(second, "step")[-1] < at(first, "export")[0] + 6
