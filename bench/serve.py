"""What the service adds to the work: latencies, cancel, resume, streams, drain, malformed requests; and the soak.

python bench/serve.py                 all figures but the soak, fake engines, this machine
python bench/serve.py cancel resume   some of them
python bench/serve.py soak --minutes 15
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sqlite3
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from deployments.fakes import fake_view
from serve_app.client import Client
from serve_app.testing import RayService, deployment

URL = "/v1/reconstructions"
WARM_S = 5.0  # a process that has just started imports, grows its heap and makes its threads with its first requests


def row(what: str, value: str, goal: str = "") -> None:
    print(f"{what:<58} {value:>24}   {goal}", flush=True)


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def ms(values: list[float]) -> str:
    return f"p50 {1000 * quantile(values, 0.5):.0f}  p99 {1000 * quantile(values, 0.99):.0f} ms"


def files(first: bytes | None = None) -> list[tuple[str, tuple[str, bytes]]]:
    return [("views", (f"view_{i:02d}.png", first if first and i == 0 else fake_view(i))) for i in range(2)]


async def status(service: RayService, job_id: str) -> None:
    """32 clients that poll: each four times a second, and each as fast as it can; after WARM_S of the same load."""
    for name, pause, seconds, goal in (("4 polls/s each", 0.25, 10, "≤ 50 ms"), ("no pause (saturated)", 0.0, 8, "")):
        taken: list[float] = []
        async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=httpx.Limits(max_connections=40)) as http:

            async def client(
                pause: float = pause, seconds: float = seconds, taken: list[float] = taken, http=http
            ) -> None:
                await asyncio.sleep(random.random() * pause)
                warm = time.monotonic() + WARM_S
                while (began := time.monotonic()) < warm + seconds:
                    answer = await http.get(f"{URL}/{job_id}")
                    assert answer.status_code == 200
                    if began >= warm:
                        taken.append(time.monotonic() - began)
                    await asyncio.sleep(max(0.0, pause - (time.monotonic() - began)))

            await asyncio.gather(*(client() for _ in range(32)))
        row(f"status, 32 clients, {name}", f"{ms(taken)} ({len(taken) / seconds:.0f}/s)", goal)


async def submit(service: RayService, job_id: str) -> None:
    """6 × 2 MB: one after another while 31 clients poll, after WARM_S of that, and 32 at the same moment."""
    pictures = [os.urandom(2_000_000) for _ in range(6)]

    def body(i: int) -> list[tuple[str, tuple[str, bytes]]]:
        script = json.dumps({"optimise_s": 0.01}).encode()
        views = [script + b" " * (2_000_000 - len(script) - 8) + f"{i:08d}".replace("0", " ").encode(), *pictures[1:]]
        return [("views", (f"view_{n:02d}.png", data)) for n, data in enumerate(views)]

    async with httpx.AsyncClient(base_url=service.url, timeout=120, limits=httpx.Limits(max_connections=80)) as http:
        done = asyncio.Event()

        async def poll() -> None:
            while not done.is_set():
                await http.get(f"{URL}/{job_id}")
                await asyncio.sleep(0.25)

        polling = [asyncio.create_task(poll()) for _ in range(31)]
        taken: list[float] = []
        warm = time.monotonic() + WARM_S
        while len(taken) < 240:
            began = time.monotonic()
            answer = await http.post(URL, files=body(0))
            assert answer.status_code == 202, answer.text
            if began >= warm:
                taken.append(time.monotonic() - began)
        done.set()
        await asyncio.gather(*polling)
        row("submit 6 × 2 MB while 31 clients poll", ms(taken), "≤ 300 ms")

        async def one() -> float:
            began = time.monotonic()
            answer = await http.post(URL, files=body(0))
            assert answer.status_code == 202, answer.text
            return time.monotonic() - began

        taken = await asyncio.gather(*(one() for _ in range(32)))
        row("submit 6 × 2 MB, 32 at the same moment (384 MB)", ms(taken))


def overhead(service: RayService, folder: Path) -> None:
    """A job of known length: what the service takes beyond it."""
    extra = []
    with service.client() as client:
        while client.list(state="queued", limit=1).items or client.list(state="running", limit=1).items:
            time.sleep(0.5)  # what other figures left behind
        for i in range(8):
            began = time.monotonic()
            job_id = service.submit(client, folder, {"seed": i}, optimise_s=2.0)
            client.wait(job_id)
            client.download(job_id, folder / "out")
            extra.append(time.monotonic() - began - 2.0)
    row(
        "added to a job of 2 s, submit to files",
        f"median {statistics.median(extra):.2f} max {max(extra):.2f} s",
        "≤ 1 s",
    )


def cancel(service: RayService, folder: Path) -> None:
    """From the call until the last step that was still made."""
    taken = []
    with service.client() as client:
        for i in range(8):
            scratch = folder / f"cancel-{i}"
            scratch.mkdir()
            job_id = service.submit(client, folder, {"seed": i}, optimise_s=60, steps=1200, scratch=str(scratch))
            service.await_step(client, job_id)
            began = time.time()
            client.cancel(job_id)
            time.sleep(2.5)
            last = float((scratch / "step").read_text().splitlines()[-1].split()[0])
            taken.append(max(0.0, last - began))
    row("cancel, until the work stands still", f"median {statistics.median(taken):.2f} max {max(taken):.2f} s", "≤ 2 s")


def resume(service: RayService, folder: Path) -> None:
    """From SIGKILL of a replica until a running job is further than it was."""
    with service.client() as client:
        for name in ("Nvdiffrec", "Conductor"):
            taken = []
            for i in range(3):
                job_id = service.submit(client, folder, {"seed": i}, optimise_s=60, steps=600)
                service.await_step(client, job_id, 15)
                began = time.monotonic()
                service.kill(name)
                service.await_step(client, job_id, client.get(job_id).step + 1)
                taken.append(time.monotonic() - began)
                client.cancel(job_id)
                time.sleep(2)
            row(
                f"resume after SIGKILL of {name}",
                f"median {statistics.median(taken):.1f} max {max(taken):.1f} s",
                "≤ 20 s",
            )


async def streams(service: RayService, count: int = 200) -> None:
    """Events on `count` open streams of one running job: from the commit in the database to the client."""
    seen: list[tuple[str, int, float]] = []
    async with httpx.AsyncClient(
        base_url=service.url, timeout=120, limits=httpx.Limits(max_connections=count + 10)
    ) as http:
        script = json.dumps({"optimise_s": 20, "steps": 400}).encode()
        job_id = (await http.post(URL, files=files(script))).json()["id"]

        async def listen() -> None:
            async with http.stream("GET", f"{URL}/{job_id}/events") as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("id: "):
                        seen.append((job_id, int(line[4:]), time.time()))

        began = time.time()
        await asyncio.gather(*(listen() for _ in range(count)))
    database = sqlite3.connect(service.data / "jobs.sqlite")
    at = dict(database.execute("SELECT seq, at FROM viewmesh_events WHERE job_id = ?", (job_id,)).fetchall())
    opened = began + 6  # events from before all streams were open are replays
    lags = [when - at[seq] for _, seq, when in seen if at[seq] > opened]
    complete = len(seen) == count * len(at)
    row(
        f"event lag, {count} streams{'' if complete else ' INCOMPLETE'}",
        f"{ms(lags)} max {1000 * max(lags):.0f}",
        "≤ 1 s",
    )


async def drain(service: RayService, count: int = 1000) -> None:
    """Queued fake jobs: how long until all are over, none lost, none twice."""
    async with httpx.AsyncClient(base_url=service.url, timeout=120, limits=httpx.Limits(max_connections=16)) as http:
        began, gate = time.monotonic(), asyncio.Semaphore(8)

        async def one(i: int) -> str:
            async with gate:
                script = json.dumps({"optimise_s": 0.0, "steps": 2}).encode()
                answer = await http.post(URL, files=files(script), headers={"idempotency-key": f"drain-{count}-{i}"})
                return answer.json()["id"]

        ids = await asyncio.gather(*(one(i) for i in range(count)))
        accepted = time.monotonic() - began
        while True:
            figures = (await http.get("/metrics")).text
            active = sum(
                float(line.split()[-1]) for line in figures.splitlines() if line.startswith("viewmesh_jobs_active{")
            )
            if not active:
                break
            await asyncio.sleep(1)
    taken = time.monotonic() - began
    database = sqlite3.connect(service.data / "jobs.sqlite")
    rows = dict(database.execute("SELECT id, state FROM viewmesh_jobs").fetchall())
    done = dict(
        database.execute("SELECT job_id, count(*) FROM viewmesh_events WHERE type = 'done' GROUP BY job_id").fetchall()
    )
    lost = sum(rows.get(job_id) != "succeeded" for job_id in ids)
    doubled = sum(done.get(job_id, 0) > 1 for job_id in ids) + count - len(set(ids))
    row(f"{count} jobs accepted in {accepted:.0f} s, drained in", f"{taken:.0f} s, {count / taken:.1f}/s", "")
    row("  lost, doubled", f"{lost}, {doubled}", "0, 0")


def malformed(service: RayService, count: int = 2000) -> None:
    """Bodies, headers and paths that no client should send."""
    before = {name: service.pids(name) for name in ("Router", "Conductor")}
    dice = random.Random(1)
    bad: dict[str, int] = {}

    def noise(size: int) -> bytes:
        return dice.randbytes(dice.randrange(size))

    def one(http: httpx.Client) -> httpx.Response:
        kind = dice.randrange(8)
        job = dice.choice(["x", "%00", "..%2f..", "a" * 64, "0" * 36])
        if kind == 0:
            return http.post(URL, content=noise(3000), headers={"content-type": "multipart/form-data; boundary=b"})
        if kind == 1:
            body = (
                b"--b\r\nContent-Disposition: form-data; name="
                + noise(20)
                + b"\r\n\r\n"
                + noise(200)
                + b"\r\n--b--\r\n"
            )
            return http.post(URL, content=body, headers={"content-type": "multipart/form-data; boundary=b"})
        if kind == 2:
            return http.post(URL, content=noise(300), headers={"content-type": "application/json"})
        if kind == 3:
            return http.post(URL, files=files(), data={"options": "{" + noise(50).decode("latin-1")})
        if kind == 4:
            return http.get(
                f"{URL}/{job}{dice.choice(['', '/events', '/artifacts/x'])}", headers={"range": "bytes=9-1"}
            )
        if kind == 5:
            return http.get(URL, params={"limit": dice.choice(["-1", "x", "1e9"]), "cursor": noise(20).hex()})
        if kind == 6:
            return http.request(dice.choice(["PUT", "PATCH", "DELETE", "OPTIONS"]), URL, content=noise(100))
        return http.post(f"{URL}/{job}/exports", content=noise(500), headers={"content-type": "application/json"})

    with httpx.Client(base_url=service.url, timeout=30) as http:
        for _ in range(count):
            answer = one(http)
            if not (
                400 <= answer.status_code < 500 and answer.headers.get("content-type") == "application/problem+json"
            ):
                asked = f"{answer.request.method} {answer.request.url}"
                key = f"{answer.status_code} {answer.headers.get('content-type')} {asked}"
                bad[key] = bad.get(key, 0) + 1
    restarts = sum(service.pids(name) != pids for name, pids in before.items())
    row(f"{count} malformed requests: not 4xx problem+json", f"{sum(bad.values())}, {restarts} restarts", "0, 0")
    for key, times in list(bad.items())[:5]:
        print(f"    {times} × {key[:160]}")


def soak(service: RayService, folder: Path, minutes: float) -> None:
    """Jobs all the time, and a random process killed every 5 to 30 s: every accepted job must end exactly once."""
    stop, ids, errors = threading.Event(), [], []
    sizes: dict[tuple[str, int], list[tuple[float, int, int]]] = {}

    def submitter(n: int) -> None:
        with Client(service.url) as client:
            k = 0
            while not stop.is_set():
                try:
                    ids.append(
                        service.submit(client, folder, {"seed": 1000 * n + k}, optimise_s=random.uniform(0.1, 2))
                    )
                except Exception as error:  # what was not accepted may be refused, but is worth a count
                    errors.append(type(error).__name__)
                k += 1
                stop.wait(random.uniform(3, 8))  # together less than one replica can do, deaths included

    threads = [threading.Thread(target=submitter, args=(n,), daemon=True) for n in range(3)]
    for thread in threads:
        thread.start()
    began, kills, next_kill = time.monotonic(), {}, time.monotonic() + 15
    while time.monotonic() - began < minutes * 60:
        time.sleep(1)
        for name in ("Router", "Conductor"):
            for pid in service.pids(name):
                sizes.setdefault((name, pid), []).append((time.monotonic(), *size_of(pid)))
        if time.monotonic() >= next_kill:
            next_kill = time.monotonic() + random.uniform(5, 30)
            name = random.choice(
                ["Router", "Conductor", "Preprocessor", "Nvdiffrec", "Nvdiffrec", "Exporter", "controller"]
            )
            title = "ray::ServeController" if name == "controller" else f"ray::ServeReplica:viewmesh:{name}"
            victims = [pid for pid, process in service.processes() if process.startswith(title)]
            if victims:
                os.kill(random.choice(victims), signal.SIGKILL)
                kills[name] = kills.get(name, 0) + 1
    stop.set()
    for thread in threads:
        thread.join(60)
    with Client(service.url) as client:
        states: dict[str, int] = {}
        for job_id in ids:
            job = client.wait(job_id)
            states[job.state] = states.get(job.state, 0) + 1
            if job.state == "succeeded":
                service.assert_whole(client, job_id)
            else:
                print("   ", job_id, job.state, job.error)
    database = sqlite3.connect(service.data / "jobs.sqlite")
    query = "SELECT job_id, count(*) FROM viewmesh_events WHERE type = 'done' GROUP BY job_id"
    ends = dict(database.execute(query).fetchall())
    row(f"soak {minutes:g} min: kills", str(sum(kills.values())), str(kills))
    row("  accepted, ended", f"{len(ids)}, {states}", f"{len(errors)} refused")
    lost, doubled = sum(ends.get(i, 0) == 0 for i in ids), sum(ends.get(i, 0) > 1 for i in ids)
    row("  lost, doubled", f"{lost}, {doubled}", "0, 0")
    for (name, pid), samples in sizes.items():
        if samples[-1][0] - samples[0][0] > 90:
            late = [s for s in samples if s[0] - samples[0][0] > 30]
            first, last = late[0], late[-1]
            span = (last[0] - first[0]) / 60
            row(
                f"  {name} {pid}, {span:.1f} min: open files, memory",
                f"{first[1]}→{last[1]}, {first[2]}→{last[2]} MiB",
                "flat",
            )


def size_of(pid: int) -> tuple[int, int]:
    """Open files, resident MiB."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return len(os.listdir(f"/proc/{pid}/fd")), pages * os.sysconf("SC_PAGE_SIZE") // 2**20
    except (OSError, ValueError):
        return 0, 0


FIGURES = ("status", "submit", "overhead", "cancel", "resume", "streams", "drain", "malformed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = [*FIGURES, "soak"]
    parser.add_argument("figures", nargs="*", help=f"some of {', '.join(named)}; all but soak if none is named")
    parser.add_argument("--minutes", type=float, default=15)
    given = parser.parse_args()
    if unknown := set(given.figures) - set(named):  # `choices` would refuse to have none named
        parser.error(f"no such figure: {', '.join(sorted(unknown))}")
    given.figures = given.figures or list(FIGURES)
    folder = Path(tempfile.mkdtemp(prefix="viewmesh-bench-"))

    def change(config: dict) -> None:
        config["applications"][0]["args"]["max_active_jobs"] = 5000
        slots = {"nvdiffrec": 8 if given.figures == ["drain"] else 2}
        deployment(config, "Conductor")["user_config"]["slots"] = slots
        deployment(config, "Nvdiffrec")["ray_actor_options"] = {"num_cpus": 0, "num_gpus": 0}

    with RayService(folder / "data", change) as service:
        with service.client() as client:
            job_id = service.submit(client, folder, optimise_s=0.1)
            client.wait(job_id)
        run: dict[str, Callable[[], object]] = {
            "status": lambda: asyncio.run(status(service, job_id)),
            "submit": lambda: asyncio.run(submit(service, job_id)),
            "overhead": lambda: overhead(service, folder),
            "cancel": lambda: cancel(service, folder),
            "resume": lambda: resume(service, folder),
            "streams": lambda: asyncio.run(streams(service)),
            "drain": lambda: asyncio.run(drain(service)),
            "malformed": lambda: malformed(service),
            "soak": lambda: soak(service, folder, given.minutes),
        }
        for name in given.figures:
            run[name]()


if __name__ == "__main__":
    main()
