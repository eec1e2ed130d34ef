"""The commands around the service: serve, submit, fetch, doctor, config check, config key; `viewmesh` wires them in.

Heavy imports happen inside the commands, so that `--help` is instant.
"""

import errno
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve_app import ingress
from viewmesh import cli as library
from viewmesh import runtime
from viewmesh.cli import Bar, errors_as_sentences
from viewmesh.command_options import takes_options
from viewmesh.errors import Cancelled, OptionError, ViewmeshError

if TYPE_CHECKING:
    from serve_app.client import Client
    from viewmesh.options import Options

# In a checkout a link to the one at the top, which a wheel holds as a file.
DEFAULT_CONFIG = (Path(__file__).parent / "serve_config.yaml").resolve()
LOCAL = "http://127.0.0.1:8000"
LOOK_S = 0.5  # how often a queued job's place is asked for
OBJECT_STORE_BYTES = 512 * 2**20  # jobs pass references, not arrays; Ray's default is a third of the memory

RUN = """
import ctypes, signal, sys
if sys.platform == "linux":  # a parent that is killed must not leave a cluster behind: PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(1, signal.SIGINT)
from ray.serve.scripts import cli
cli()
"""

config = typer.Typer(help="Check serve_config.yaml; make API keys.", no_args_is_help=True)


def serve(
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Where to listen; the config's, 8000, by default.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="A public address needs API keys; the config's, 127.0.0.1, by default.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Where jobs and their files lie; the config's, ./data, by default.", file_okay=False),
    ] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="serve_config.yaml")] = None,
    fake: Annotated[float | None, typer.Option(help="Engines that need no model: seconds per job.")] = None,
    verbose: Annotated[bool, typer.Option(help="Show the log here instead of in DATA/serve.log.")] = False,
) -> None:
    """Start the service on this machine, fitted to it, and stay until Ctrl-C."""
    with errors_as_sentences():
        file = write_adapted(config_file or DEFAULT_CONFIG, data, port=port, host=host, fake=fake)
        refuse_unfit_address(file)
        data, url = file.parent, listening_at(file)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        child = start(file, data, verbose=verbose)
        try:
            await_ready(url, child, data)
            typer.echo(
                f"viewmesh is ready at {url}  (page /, API /docs, data {data}, log {data / 'serve.log'})", err=True
            )
            child.wait()  # until Ctrl-C: the child is in a session of its own and does not hear it
            raise ViewmeshError(f"The service ended (exit {child.returncode}).", hint=_tail(data))
        except KeyboardInterrupt:
            typer.echo("Stopping; jobs go on at the next start.", err=True)
        finally:
            stop(child)


Url = Annotated[str, typer.Option("--url", envvar="VIEWMESH_URL", help="The running service.")]
ApiKey = Annotated[str | None, typer.Option("--key", envvar="VIEWMESH_KEY", help="API key.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the mesh and its report go.", file_okay=False)]


@errors_as_sentences()
@takes_options
def submit(
    source: Annotated[Path, typer.Argument(help="A folder or zip of views.", exists=True)],
    out: Out,
    url: Url = LOCAL,
    key: ApiKey = None,
    *,
    options: "Options",
) -> None:
    """Send a view set to a running service, show its progress, fetch the result. Ctrl-C cancels the job."""
    reconstruct_over_http(url, source, out, options, key=key)


@errors_as_sentences()
def fetch(
    job: Annotated[str, typer.Argument(help="The job's id, as submit printed it.")],
    out: Out,
    url: Url = LOCAL,
    key: ApiKey = None,
) -> None:
    """Wait for a job of a running service, show its progress, fetch the result. Ctrl-C leaves the job alone."""
    from serve_app.client import Client

    _made_writable(out)
    with Client(url, key=key) as client, _found_again(client, job, out):
        try:
            follow(client, job)
        except KeyboardInterrupt:
            raise Cancelled(f"Job {job} goes on.", hint=_fetching(client, job, out)) from None
        receive(client, job, out)


def reconstruct_over_http(
    url: str, source: Path, out: Path, options: Any, *, key: str | None = None
) -> dict[str, Path]:
    """Submits, follows and downloads; Ctrl-C cancels the job. Raises ServiceError, ViewmeshError, OSError."""
    from serve_app.client import Client

    _made_writable(out)
    with Client(url, key=key) as client:
        job = client.submit(source, options)
        typer.echo(f"job {job.id}", err=True)
        with _found_again(client, job.id, out):
            try:
                follow(client, job.id)
            except KeyboardInterrupt:
                client.cancel(job.id)
                raise Cancelled(f"Job {job.id} cancelled.") from None
            return receive(client, job.id, out)


def follow(client: "Client", job_id: str) -> None:
    """Shows a job's place in the queue, then its progress, until it is over."""
    place = None
    while (job := client.get(job_id)).state == "queued":
        if job.queue_position != place:
            place = job.queue_position
            typer.echo(f"queued, {place} before it" if place else "queued, the next", err=True)
        time.sleep(LOOK_S)
    with Bar() as bar:
        for event in client.events(job_id):
            if event.type == "progress":
                known = ("stage", "step", "steps", "percent", "eta_s")
                metrics = {name: value for name, value in event.data.items() if name not in known}
                bar(event.data["stage"], event.data["step"], event.data["steps"], **metrics)


def receive(client: "Client", job_id: str, out: Path) -> dict[str, Path]:
    """The files of a job that is over, and what there is to say of them. Raises ViewmeshError if it has none."""
    job = client.get(job_id)
    if job.error is not None:
        error = ViewmeshError(job.error.message, hint=job.error.hint)
        error.code = job.error.code
        raise error
    if job.state != "succeeded":
        raise ViewmeshError(f"The job was {job.state}.")
    files, report = client.download(job_id, out), job.report or {}
    library.tell_notes(report)
    typer.echo(f"{files.get('mesh.glb', out)}: {report.get('faces', '?')} faces", err=True)
    return files


@contextmanager
def _found_again(client: "Client", job_id: str, out: Path) -> Iterator[None]:
    """Where the service goes away, or its files are damaged on the way: how to get at the job's result."""
    from serve_app.client import ServiceError

    try:
        yield
    except ServiceError as error:
        if error.status >= 500:
            error.hint = _fetching(client, job_id, out)
        raise


def _fetching(client: "Client", job_id: str, out: Path) -> str:
    command = shlex.join(["viewmesh", "fetch", job_id, "-o", str(out), "--url", client.url])
    return f"{command} waits for its end and fetches the result."


def _made_writable(folder: Path) -> None:
    """Raises OSError now for a folder that the files could not be written to when they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def doctor(
    address: Annotated[
        str | None,
        typer.Option(help="Ray dashboard of a cluster to look at: http://HOST:8265."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running service to look at; the cluster's by default.")] = None,
    key: Annotated[str | None, typer.Option(envvar="VIEWMESH_KEY", help="API key of the service.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine, or a running cluster, can do, what is wrong, and what would be right."""
    if address is None and url is None:
        library.doctor(as_json)
        return
    from serve_app import cluster_doctor

    library.tell_findings(cluster_doctor.examine(address, url, key=key), as_json=as_json)


@config.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="serve_config.yaml")] = Path("serve_config.yaml"),
) -> None:
    """Find unknown keys and wrong values, which Ray accepts in silence."""
    from serve_app import config as configuration

    with errors_as_sentences():
        value = configuration.load(file)
        found = configuration.check(value)
        if not found:
            configuration.import_target(value)
    for sentence in found:
        typer.echo(f"{file}: {sentence}", err=True)
    if found:
        raise typer.Exit(2)
    typer.echo(f"{file}: ok", err=True)


@config.command("key")
@errors_as_sentences()
def key(
    owner: Annotated[str, typer.Argument(help="Keys of one owner see the same jobs.")],
    file: Annotated[Path, typer.Option(help="The keys file to add it to.")] = Path("keys.yaml"),
    max_active_jobs: Annotated[int | None, typer.Option(help="Queued and running jobs at once.")] = None,
    upload_bytes_per_day: Annotated[int | None, typer.Option(help="Uploads in any 24 hours.")] = None,
) -> None:
    """Make an API key: printed once, kept as a hash."""
    import yaml

    from serve_app.auth import Key, new_key

    secret, digest = new_key()
    entry = Key(owner=owner, sha256=digest, max_active_jobs=max_active_jobs, upload_bytes_per_day=upload_bytes_per_day)
    kept = yaml.safe_load(file.read_text()) if file.exists() else []
    kept = [*(kept or []), entry.model_dump(exclude_none=True)]
    staged = file.with_suffix(".part")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        yaml.safe_dump(kept, opened, sort_keys=False)
    staged.replace(file)
    typer.echo(secret)


# --- starting and stopping, also used by the tests, the demo and the benchmark ---------------------------------------


def write_adapted(
    config_file: Path,
    data: Path | None,
    *,
    port: int | None = None,
    host: str | None = None,
    fake: float | None = None,
    change: Any = None,
) -> Path:
    """The config fitted to this machine, written into its data folder; what is None stays as the config has it.

    Raises OptionError for anything that `check` finds.
    """
    from serve_app import config as configuration

    value = configuration.load(config_file)
    found = configuration.check(value)
    if found:
        raise OptionError(f"{config_file}: {found[0]}", hint=f"viewmesh config check {config_file}")
    data = data or configuration.data_folder(value)
    data.mkdir(parents=True, exist_ok=True)
    fitted = configuration.adapted(value, cpus=os.cpu_count() or 1, gpus=_gpus(), data=data, port=port, host=host)
    if fake is not None:
        for application in fitted["applications"]:
            application["args"]["fake"] = {"optimise_s": fake}
    if change is not None:
        change(fitted)
    import yaml

    file = data / "serve_config.yaml"
    file.write_text(yaml.safe_dump(fitted, sort_keys=False))
    return file


def listening_at(file: Path) -> str:
    """The URL of the service that a config starts, as seen from this machine."""
    import yaml

    host, port = _address(yaml.safe_load(file.read_text()))
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
    return f"http://{host}:{port}"


def refuse_unfit_address(file: Path) -> None:
    """Raises OptionError where the service of a config could not listen, or would be open to anybody."""
    import yaml

    from serve_app.auth import refuse_to_be_open
    from serve_app.settings import AppArgs

    value = yaml.safe_load(file.read_text())
    host, port = _address(value)
    for application in value["applications"]:
        if application.get("import_path") == "serve_app.app:build":
            refuse_to_be_open(AppArgs.model_validate(application["args"]).auth, host)
    _refuse_taken(host, port)


def _refuse_taken(host: str, port: int) -> None:
    """Serve would say so after many seconds, or another program would answer in its place."""
    if not 0 <= port <= 65535:
        raise OptionError(f"There is no port {port}; choose one from 1 to 65535 (http_options.port, --port).")
    failed = {_failed_bind(*found) for found in _addresses(host, port)}
    if errno.EADDRINUSE in failed:
        raise OptionError(f"Port {port} of {host} is taken; choose another with --port.")
    if errno.EACCES in failed:
        raise OptionError(f"Port {port} of {host} needs rights; choose one above 1023 with --port.")
    if None not in failed:
        raise OptionError(f"{host} is no address of this machine; choose another with --host.")


def _addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    """Those of a name or of an address; none of a name that nobody knows."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []


def _failed_bind(family: int, kind: int, protocol: int, _: str, address: Any) -> int | None:
    """Why nothing could listen there, as errno; None if something could."""
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # its last service may have ended just now
            probe.bind(address)
    except OSError as error:
        return error.errno
    return None


def _address(config: dict[str, Any]) -> tuple[str, int]:
    """Host and port that a config listens on."""
    http = config.get("http_options") or {}
    return http.get("host", "127.0.0.1"), http.get("port", 8000)


def start(
    file: Path, data: Path, *, verbose: bool = False, env: dict[str, str] | None = None, address: str = "local"
) -> subprocess.Popen:
    """`serve run` on a Ray of its own, or on the cluster at an address; in a process group of its own."""
    environment = {
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(OBJECT_STORE_BYTES),
        "RAY_USAGE_STATS_ENABLED": "0",
        **threads(os.cpu_count() or 1, _gpus()),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 lets its own services interrupt a fit: 3 s of 25 on two cores
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # Ray's 0.1 costs an idle laptop twice as much as all our replicas
        **runtime.missing(),
        **ingress.environment(),
        **ingress.own_ports(),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]),
        **os.environ,
        **(env or {}),
    }
    command = [sys.executable, "-c", RUN, "run", "--address", address, str(file)]
    out = None if verbose else open(data / "serve.log", "ab")  # noqa: SIM115  (the child's)
    return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def await_ready(url: str, child: subprocess.Popen, data: Path, seconds: float = 180.0) -> None:
    """Returns once /readyz says so. Raises ViewmeshError if the service ends or does not come up."""
    import httpx

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if child.poll() is not None:
            raise ViewmeshError(f"The service ended while it started (exit {child.returncode}).", hint=_tail(data))
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise ViewmeshError(f"The service was not ready after {seconds:.0f} s.", hint=_tail(data))


def stop(child: subprocess.Popen, seconds: float = 40.0) -> None:
    """As Ctrl-C does; then less politely."""
    for sign, patience in ((signal.SIGINT, seconds), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        if child.poll() is not None:
            return
        try:
            os.killpg(child.pid, sign)
            child.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _tail(data: Path) -> str:
    log = data / "serve.log"
    return f"{log}: {log.read_text(errors='replace')[-600:]}" if log.exists() else ""


def threads(cpus: int, gpus: int) -> dict[str, str]:
    """How many threads each worker computes with; Ray's default is its num_cpus, one, which takes twice as long.

    Without a GPU one worker at a time computes, with all CPUs. Beside a GPU several generated meshes are textured at
    once, and others are written: more threads than this, awake while they wait, stand in each other's way.
    """
    count = cpus if gpus == 0 else max(1, cpus // (4 * gpus))
    return {"OMP_NUM_THREADS": str(count), "NUMBA_NUM_THREADS": str(count)}


def _gpus() -> int:
    """GPUs that Ray will see, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0
