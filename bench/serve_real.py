"""What the service adds to a real reconstruction: submit to files over HTTP, against `viewmesh reconstruct`.

python bench/serve_real.py [CAPTURE] [--share 0.1] [--runs 1]

Both work on six canonical views, the sample's by default, with the same options and the same engine. --share: of the
preset's steps, so that a run takes a fraction of its two minutes; everything else is the preset's. The library's time
is that of the call in a process whose imports are done and whose kernels are built, as the service's replica is; the
whole command is shown beside it. The service does one job before those that are timed.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARE = "VIEWMESH_BENCH_SHARE"
STAGES = ("prepare", "optimise", "finish", "export")


def real(capture: Path | None = None, share: float = 0.1, runs: int = 1) -> None:
    """Prints the figures. Starts and stops a service of its own; the machine should have nothing else to do."""
    os.environ[SHARE] = str(share)
    with tempfile.TemporaryDirectory() as folder:
        views = capture or sample(Path(folder) / "sample")
        library, service = [], []
        for i in range(runs):  # in turn, because the speed of a machine drifts
            library.append(over_the_command(views, Path(folder) / f"library-{i}"))
            service.append(over_http(views, Path(folder) / f"service-{i}"))
    call = statistics.median(found["call"] for found in library)
    whole = statistics.median(found["whole"] for found in library)
    wall = statistics.median(found["wall"] for found in service)
    row("viewmesh reconstruct, imports done", f"{call:.2f} s", stages(library[0]["stages"]))
    row("viewmesh reconstruct, the whole command", f"{whole:.2f} s")
    work = statistics.median(sum(found["stages"].values()) for found in service)
    row("the service, submit to files", f"{wall:.2f} s", stages(service[0]["stages"]))
    row("the service beside its stages' own seconds", f"{wall - work:+.2f} s")
    row("added by the service to the call", f"{wall - call:+.2f} s")
    row("added by the service to the whole command", f"{wall - whole:+.2f} s", "≤ 1 s")
    row("calls", "", "  ".join(f"{found['call']:.1f}" for found in library))
    row("jobs", "", "  ".join(f"{found['wall']:.1f}" for found in service))


def row(what: str, value: str, more: str = "") -> None:
    print(f"{what:<48} {value:>10}   {more}", flush=True)


def stages(seconds: dict[str, float]) -> str:
    return "  ".join(f"{name} {seconds[name]:.2f}" for name in STAGES if name in seconds)


def sample(folder: Path) -> Path:
    from viewmesh.sample.capture import write_sample

    write_sample(folder, parts=("six",))
    return folder / "six"


def options() -> Any:
    from viewmesh.options import Options, ViewRules

    return Options(model="nvdiffrec", seed=0, views=ViewRules(rig="canonical6"))


# --- the service -----------------------------------------------------------------------------------------------------


def over_http(views: Path, folder: Path) -> dict[str, Any]:
    from serve_app.testing import RayService, deployment

    def change(config: dict) -> None:
        application = config["applications"][0]
        application["import_path"] = "bench.serve_real:build"
        application["args"]["fake"] = None
        deployment(config, "Nvdiffrec")["user_config"]["slice_s"] = 8

    found = {}
    with RayService(folder / "data", change) as service, service.client() as client:
        for i in range(2):  # the first one warms
            began = time.monotonic()
            job = client.submit(views, options())
            done = client.wait(job.id)
            client.download(job.id, folder / f"result-{i}")
            found["wall"] = time.monotonic() - began
            assert done.state == "succeeded", done.error
            assert done.report is not None
            found["stages"] = {name: done.report["seconds"][name] for name in STAGES if name in done.report["seconds"]}
            # report.json is written before the export is over
            found["stages"]["export"] = service_seconds(service.data, job.id)["export"]
    return found


def service_seconds(data: Path, job_id: str) -> dict[str, float]:
    import sqlite3

    with sqlite3.connect(data / "jobs.sqlite") as database:
        (text,) = database.execute("SELECT timings FROM viewmesh_jobs WHERE id = ?", (job_id,)).fetchone()
    return json.loads(text)


def build(args: dict) -> Any:
    """serve_app.app:build with an optimiser that makes a share of its steps."""
    from deployments.nvdiffrec import Nvdiffrec
    from serve_app import app, models
    from serve_app.settings import AppArgs

    def bind(args: AppArgs) -> Any:
        engine_args = {"device": args.device, "share": float(os.environ[SHARE])}
        return Nvdiffrec.bind(args.artifacts_url(), "bench.serve_real:shortened_engine", engine_args)

    models.MODELS["nvdiffrec"] = dataclasses.replace(models.MODELS["nvdiffrec"], bind=bind)
    return app.build(AppArgs.model_validate(args))


def shortened_engine(device: str, share: float) -> Any:
    shorten(share)
    from deployments.adapters.nvdiffrec import NvdiffrecOptimiser

    return NvdiffrecOptimiser(device)


def shorten(share: float) -> None:
    """Before anything imports the presets."""
    from viewmesh.nvdiffrec import presets

    preset = presets.preset

    def made(*args: Any, **kwargs: Any) -> Any:
        whole = preset(*args, **kwargs)
        shape, texture = round(whole.shape_steps * share), round(whole.texture_steps * share)
        return dataclasses.replace(whole, shape_steps=max(1, shape), texture_steps=max(1, texture))

    presets.preset = made


# --- the library -----------------------------------------------------------------------------------------------------


def over_the_command(views: Path, out: Path) -> dict[str, Any]:
    """A process of its own, as the command is; its kernels are built before the call, which is not counted."""
    began = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--library", str(views), str(out)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(child.stdout.splitlines()[-1])
    return {**found, "whole": time.monotonic() - began - found["warm"]}


def library(views: Path, out: Path) -> None:
    from viewmesh import runtime

    runtime.prepare()
    shorten(float(os.environ[SHARE]))
    from deployments.adapters.nvdiffrec import warm_up
    from viewmesh import reconstruct

    began = time.monotonic()
    warm_up(reconstruct.best_device())
    warm = time.monotonic() - began
    began = time.monotonic()
    files = reconstruct.reconstruct(views, out, options())
    call = time.monotonic() - began
    seconds = json.loads(files["report.json"].read_text())["seconds"]
    print(json.dumps({"call": call, "warm": warm, "stages": {**seconds, "export": call - sum(
        value for name, value in seconds.items() if name != "export")}}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capture", type=Path, nargs="?", help="six canonical views, as `viewmesh sample` writes them")
    parser.add_argument("--share", type=float, default=0.1, help="of the preset's steps")
    parser.add_argument("--runs", type=int, default=1, help="of each; the median is shown")
    parser.add_argument("--library", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library:
        library(*args.library)
    else:
        real(args.capture, args.share, args.runs)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
