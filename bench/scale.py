"""Jobs per hour for 1, 2, 4 … replicas on one host: the real service, its queue and HTTP, a GPU each if not told else.

python bench/scale.py data/spot --replicas 4 2 1                         Nvdiffrec, preset standard
python bench/scale.py data/spot --model trellis --weights DIR --jobs 48  TRELLIS with the weights in DIR
python bench/scale.py data/spot --model trellis --jobs 48                TRELLIS with random weights, see bench/shell.py
python bench/scale.py data/spot --replicas 2 --per-gpu 2                 two replicas on one GPU
python bench/scale.py --fake 6 --replicas 2 1                            the service alone: engines that only wait
python bench/scale.py --fake 0.05 --replicas 1 --seats 18 --jobs 300     what one Conductor can do

A wave is `--jobs` jobs per replica, submitted as fast as 32 uploads at a time go; its rate is jobs / (first submitted
→ last one succeeded), so uploads, preparing, unwrapping and exporting are in it, and the slowest replica decides. Of
a wave of many jobs the sustained rate is told too: the slope of jobs that ended over time, without the first and the
last tenth, in which replicas have not enough to do. Efficiency is either rate per replica over that of the smallest
wave. All waves go through one service whose number of replicas is edited between them (`serve deploy`), the largest
first. GPU use is what nvidia-smi says while the models run. Before the first wave each replica has done a job of the
preset preview. Last, with replicas following the queue from one to all: the time from the first queued job to each
new replica.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import tempfile
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from trellis import CHECKPOINTS, checkpoint

from deployments.trellis import Trellis
from serve_app.client import Client, ServiceError
from serve_app.schemas import ReconstructionView
from serve_app.testing import RayService, deployment
from viewmesh.options import Options

WORKER = {"nvdiffrec": "Nvdiffrec", "trellis": "Trellis"}
STAGE = {"nvdiffrec": "optimise", "trellis": "generate"}
UPLOADS = 32  # at a time: of hundreds that share the way, the first arrives when most of them do
MANY = 30  # jobs of a wave that has a sustained rate


@dataclass(frozen=True)
class Wave:
    """What one number of replicas did: seconds from its start to the end of each job, rising; GPU use in percent."""

    replicas: int
    ends_s: list[float]
    jobs: list[ReconstructionView]
    gpu: dict[int, float]

    @property
    def wall_s(self) -> float:
        return self.ends_s[-1]

    @property
    def per_hour(self) -> float:
        return 3600 * len(self.jobs) / self.wall_s

    @property
    def sustained_per_hour(self) -> float | None:
        """None for a wave of a few jobs."""
        if len(self.ends_s) < MANY:
            return None
        tenth = len(self.ends_s) // 10
        middle = self.ends_s[tenth : len(self.ends_s) - tenth]
        return 3600 * statistics.linear_regression(middle, range(len(middle))).slope


class GpuUse(threading.Thread):
    """(time, GPU, percent) twice a second, as nvidia-smi has it; nothing where there is none."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int, float]] = []
        query = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
        try:
            self.smi = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
            self.start()
        except FileNotFoundError:
            self.smi = None

    def run(self) -> None:
        for line in self.smi.stdout:  # pyright: ignore[reportOptionalMemberAccess]
            index, percent = line.split(",")
            self.samples.append((time.time(), int(index), float(percent)))

    def between(self, start: float, end: float) -> dict[int, float]:
        """Mean percent of each GPU that did anything."""
        found: dict[int, list[float]] = defaultdict(list)
        for at, index, percent in self.samples:
            if start <= at <= end:
                found[index].append(percent)
        return {index: statistics.fmean(values) for index, values in sorted(found.items()) if max(values) > 5}

    def stop(self) -> None:
        if self.smi is not None:
            self.smi.terminate()


class Bench:
    def __init__(self, given: argparse.Namespace, service: RayService, client: Client, source: Path | None) -> None:
        self.given, self.service, self.client, self.source = given, service, client, source
        self.worker, self.stage = WORKER[given.model], STAGE[given.model]
        self.gpus, self.seed = GpuUse(), 0
        self.scratch = Path(tempfile.mkdtemp(prefix="viewmesh-scale-"))

    def submit(self, count: int) -> list[str]:
        """So many jobs as fast as they go, each with a seed of its own."""
        seeds = range(self.seed, self.seed + count)
        self.seed += count
        with ThreadPoolExecutor(min(count, UPLOADS)) as pool:
            return list(pool.map(self.submit_one, seeds))

    def submit_one(self, seed: int) -> str:
        if self.source is None:
            return self.service.submit(self.client, self.scratch, {"seed": seed})
        return self.client.submit(self.source, Options(model=self.given.model, preset=self.given.preset, seed=seed)).id

    def running(self) -> int:
        replicas = self.service.status()["deployments"][self.worker]["replicas"]
        return sum(replica["state"] == "RUNNING" for replica in replicas)

    def fix(self, low: int, high: int) -> None:
        """Edits the number of replicas, as a user would; returns once `low` run."""

        def change(config: dict) -> None:
            scaled(config, self.worker, low, high)
            seats(config, self.given, high)
            others(config, self.given.model, high)

        self.service.deploy(change)
        until = time.monotonic() + 240
        while self.running() != low or self.service.status()["status"] != "RUNNING":
            assert time.monotonic() < until, self.service.status()
            time.sleep(0.3)

    def warm(self, count: int) -> None:
        """Each process does a short job, so that no wave pays for what happens once."""
        preset, self.given.preset = self.given.preset, "preview"
        jobs, self.given.jobs = self.given.jobs, 1
        wave = self.wave(count)
        self.given.preset, self.given.jobs = preset, jobs
        print(f"warm after {wave.wall_s:.0f} s: a preview on each of {count}", flush=True)

    def cancel(self, ids: list[str]) -> None:
        for job_id in ids:
            with contextlib.suppress(ServiceError):  # it was faster
                self.client.cancel(job_id)

    def await_stage(self, job_id: str) -> None:
        while True:
            job = self.client.get(job_id)
            if job.state != "queued" and (job.stage not in (None, "prepare") or job.state != "running"):
                assert job.state in ("running", "succeeded"), job.error
                return
            time.sleep(0.1)

    def wave(self, replicas: int) -> Wave:
        began = time.time()
        ids = self.submit(replicas * self.given.jobs)
        self.await_stage(ids[0])
        working = time.time()
        while any(self.client.list(state=state, limit=1).items for state in ("queued", "running")):
            time.sleep(0.5)  # in this order: a job that leaves the queue between the two questions is found running
        jobs = [self.client.get(job_id) for job_id in ids]
        assert all(job.state == "succeeded" for job in jobs), [job.error for job in jobs]
        ends = sorted(datetime.fromisoformat(job.finished_at or "").timestamp() for job in jobs)
        tail = max(seconds(job).get("export", 0.0) + seconds(job).get("finish", 0.0) for job in jobs)
        gpu = self.gpus.between(working + 1, ends[-1] - tail - 1)
        return Wave(replicas, [end - began for end in ends], jobs, gpu)

    def follow_queue(self, most: int) -> list[float]:
        """Seconds from the first of `most` queued jobs to each further replica, with replicas following the queue."""
        self.fix(1, most)
        began, ids, seen = time.monotonic(), self.submit(most), []
        while len(seen) < most - 1 and time.monotonic() - began < 120:
            seen += [time.monotonic() - began] * (self.running() - 1 - len(seen))
            time.sleep(0.3)
        self.cancel(ids)
        return seen


def scaled(config: dict, name: str, low: int, high: int) -> None:
    scaling = deployment(config, name).setdefault("autoscaling_config", {"target_ongoing_requests": 1})
    scaling.update(min_replicas=low, max_replicas=high)


def others(config: dict, model: str, replicas: int) -> None:
    """The deployments on the CPU must not be what waves wait for: TRELLIS makes a mesh while one is written."""
    count = replicas if model == "nvdiffrec" else 2 * replicas
    for name in ("Preprocessor", "Exporter"):
        scaled(config, name, count, count)


def seats(config: dict, given: argparse.Namespace, replicas: int) -> None:
    deployment(config, "Conductor")["user_config"]["slots"] = {given.model: given.seats * replicas}


def seconds(job: ReconstructionView) -> dict[str, float]:
    return (job.report or {}).get("seconds") or {}


def zipped(capture: Path, folder: Path) -> Path:
    """The capture without its test views."""
    file = folder / "capture.zip"
    with zipfile.ZipFile(file, "w") as made:
        for path in sorted(capture.rglob("*")):
            name = path.relative_to(capture)
            other = name.parts[0] == "six" or any("test" in part for part in name.parts)
            if path.suffix in (".png", ".jpg", ".json") and not other:
                made.write(path, name.as_posix())
    return file


def adapt(given: argparse.Namespace, most: int):
    def change(config: dict) -> None:
        application = config["applications"][0]
        args, listed = application["args"], application["deployments"]
        seats(config, given, most)
        args["fake"] = {"optimise_s": given.fake} if given.fake else None
        deployment(config, "Nvdiffrec")["user_config"]["slice_s"] = 8.0
        if given.model == "trellis":
            listed[:] = [entry for entry in listed if entry["name"] != "Nvdiffrec"]
            weights = given.weights or checkpoint(CHECKPOINTS, "trellis")
            args.update(models=["trellis"], weights={"trellis": str(weights.absolute())})
            compiled = {"compile": given.compile}
            listed.append({"name": "Trellis", "user_config": compiled})
            if given.weights is None:
                application["import_path"] = "bench.shell:build"
        actor = {"num_gpus": 1 / given.per_gpu} if given.gpus else {"num_gpus": 0, "num_cpus": 0.2}
        deployment(config, WORKER[given.model])["ray_actor_options"] = actor
        others(config, given.model, most)
        for name in ("Preprocessor", "Exporter"):
            deployment(config, name)["max_ongoing_requests"] = 1  # one job each: all of them are warm after the first
            if not given.gpus:
                deployment(config, name)["ray_actor_options"] = {"num_cpus": 0.1}
        deployment(config, WORKER[given.model])["max_ongoing_requests"] = given.seats
        scaled(config, WORKER[given.model], most, most)

    return change


def told(wave: Wave, smallest: Wave | None) -> None:
    stages: dict[str, list[float]] = defaultdict(list)
    for job in wave.jobs:
        for stage, value in seconds(job).items():
            stages[stage].append(value)
    parts = "  ".join(f"{stage} {statistics.median(v):.1f} (≤ {max(v):.1f})" for stage, v in stages.items())
    gpu = " ".join(f"{percent:.0f}" for percent in wave.gpu.values()) or "–"
    whole = rate(wave, smallest, lambda w: w.per_hour)
    sustained = rate(wave, smallest, lambda w: w.sustained_per_hour)
    print(
        f"{wave.replicas} replicas, {len(wave.jobs)} jobs: {wave.wall_s:7.1f} s  {whole}  sustained {sustained}"
        f"  GPUs {gpu} %  resumes {sum(job.resumes for job in wave.jobs)}\n"
        f"    seconds by stage, median (max): {parts}",
        flush=True,
    )


def rate(wave: Wave, smallest: Wave | None, of: Callable[[Wave], float | None]) -> str:
    """Jobs per hour, and the efficiency where there is a wave to compare it with."""
    here, there = of(wave), of(smallest) if smallest else None
    if here is None:
        return "–"
    if there is None or smallest is None:
        return f"{here:.1f} jobs/h"
    return f"{here:.1f} jobs/h, efficiency {here / wave.replicas / there * smallest.replicas:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capture", type=Path, nargs="?", help="a view set; none with --fake")
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 2, 1])
    parser.add_argument("--per-gpu", type=int, default=1, help="replicas that share a GPU")
    parser.add_argument("--jobs", type=int, default=1, help="jobs per replica in a wave")
    parser.add_argument("--model", choices=list(WORKER), default="nvdiffrec")
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--weights", type=Path, help="folder of the TRELLIS checkpoint; else random")
    parser.add_argument("--seats", type=int, help="jobs that a replica takes at once; Trellis' own number, else 1")
    parser.add_argument("--compile", action="store_true", help="compile the networks of TRELLIS")
    parser.add_argument("--fake", type=float, help="seconds that a job of the fake engine takes")
    parser.add_argument("--cpu", dest="gpus", action="store_false", help="replicas need no GPU")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; leaves out waves between most and fewest")
    parser.add_argument("--no-queue", dest="queue", action="store_false", help="no replicas following the queue")
    given = parser.parse_args()
    given.gpus = given.gpus and not given.fake
    given.seats = given.seats or (Trellis.max_ongoing_requests if given.model == "trellis" else 1)
    began, most = time.monotonic(), max(given.replicas)
    folder = Path(tempfile.mkdtemp(prefix="viewmesh-scale-"))
    source = zipped(given.capture, folder) if given.capture else None
    with RayService(folder / "data", adapt(given, most)) as service, service.client() as client:
        bench = Bench(given, service, client, source)
        print(f"{most} replicas ready after {time.monotonic() - began:.0f} s, {os.cpu_count()} CPU cores", flush=True)
        bench.warm(most)
        waves: dict[int, Wave] = {}
        for count in sorted(given.replicas, reverse=True):
            spent, last = time.monotonic() - began, max((w.wall_s for w in waves.values()), default=0.0)
            if min(given.replicas) < count < most and spent + 2 * last > given.budget:
                print(f"{count} replicas left out: no time")
                continue
            bench.fix(count, count)
            waves[count] = bench.wave(count)
            told(waves[count], None)
        if given.queue and time.monotonic() - began < given.budget:
            found = bench.follow_queue(most)
            print("replicas following the queue, from 1: " + ", ".join(f"{s:.1f} s" for s in found))
        print()
        for wave in waves.values():
            told(wave, waves[min(waves)])
        bench.gpus.stop()


if __name__ == "__main__":
    main()
