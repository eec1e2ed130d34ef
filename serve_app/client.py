"""A small typed client of the HTTP API.

    with Client("http://127.0.0.1:8000") as client:
        job = client.submit(Path("views"), Options(preset="preview"))
        for event in client.events(job.id): ...
        client.download(job.id, Path("out"))

Reading is repeated when the connection breaks; submitting too, under an Idempotency-Key, so a job is never made twice.
"""

import hashlib
import json
import shutil
import tempfile
import time
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from serve_app.schemas import (
    ExportRequest,
    ModelList,
    ReconstructionList,
    ReconstructionView,
)
from viewmesh.errors import InputError, OptionError, ViewmeshError
from viewmesh.options import Options
from viewmesh.views.find import Files, find_files
from viewmesh.views.limits import Limits

RETRIES = 8
CONNECT_S = 5.0
PATIENCE_S = 3.0  # with a service that never answered; one that did may restart, and its Routers take turns at that


class ServiceError(ViewmeshError):
    """The service answered with a problem; `status`, `code`, `hint` and `request_id` are its."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(body.get("detail") or f"The service answered {status}.", hint=body.get("hint", ""))
        self.status = status
        self.code = body.get("code", "error")
        self.request_id = body.get("request_id", "")


@dataclass(frozen=True)
class Event:
    """One server-sent event: `state`, `progress`, `preview`, `artifact` or `done`."""

    id: int
    type: str
    data: dict[str, Any]


class Client:
    """Raises OptionError for an URL that is none."""

    def __init__(self, url: str = "http://127.0.0.1:8000", *, key: str | None = None, timeout_s: float = 60.0) -> None:
        _check_url(url)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url, self.answered = url, False
        self.http = httpx.Client(base_url=url, headers=headers, timeout=_timeout(timeout_s))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.http.close()

    def submit(
        self, source: Path, options: Options | None = None, *, idempotency_key: str | None = None, webhook_url: str = ""
    ) -> ReconstructionView:
        """Sends a view set: a folder in the form of the README, or a zip. Raises InputError, ServiceError."""
        fields = {"options": options.model_dump_json(exclude_defaults=True) if options else "{}"}
        if webhook_url:
            fields["webhook_url"] = webhook_url
        key = idempotency_key or uuid.uuid4().hex

        with tempfile.TemporaryDirectory(prefix="viewmesh-submit-") as scratch:
            parts = files_of(source, Path(scratch))

            def send() -> httpx.Response:
                files = [(field, (path.name, open(path, "rb"))) for field, path in parts]  # noqa: SIM115
                try:
                    return self.http.post(
                        "/v1/reconstructions",
                        data=fields,
                        files=files,
                        headers={"idempotency-key": key},
                        timeout=_timeout(900),
                    )
                finally:
                    for _, (_, opened) in files:
                        opened.close()

            return ReconstructionView.model_validate(self._ask(send).json())

    def get(self, job_id: str) -> ReconstructionView:
        return ReconstructionView.model_validate(self._get(f"/v1/reconstructions/{job_id}").json())

    def list(self, *, state: str | None = None, limit: int = 20, cursor: str | None = None) -> ReconstructionList:
        given = {"state": state, "limit": limit, "cursor": cursor}
        query = {name: value for name, value in given.items() if value is not None}
        return ReconstructionList.model_validate(
            self._ask(lambda: self.http.get("/v1/reconstructions", params=query)).json()
        )

    def models(self) -> ModelList:
        return ModelList.model_validate(self._get("/v1/models").json())

    def cancel(self, job_id: str) -> ReconstructionView:
        answer = self._ask(lambda: self.http.post(f"/v1/reconstructions/{job_id}/cancel"))
        return ReconstructionView.model_validate(answer.json())

    def delete(self, job_id: str) -> None:
        self._ask(lambda: self.http.delete(f"/v1/reconstructions/{job_id}"))

    def export(self, job_id: str, request: ExportRequest) -> ReconstructionView:
        key = {"idempotency-key": uuid.uuid4().hex}
        url = f"/v1/reconstructions/{job_id}/exports"
        answer = self._ask(lambda: self.http.post(url, json=request.model_dump(), headers=key))
        return ReconstructionView.model_validate(answer.json())

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """The job's events until it is over. A broken stream is taken up again where it broke. Raises ServiceError."""
        failures, began = 0, time.monotonic()
        while True:
            try:
                headers = {"last-event-id": str(after), "accept": "text/event-stream"}
                url = f"/v1/reconstructions/{job_id}/events"
                with self.http.stream("GET", url, headers=headers, timeout=_timeout(60, read=45)) as answer:
                    self.answered = True
                    if answer.status_code == 204:
                        return
                    _check(answer)
                    for event in _parse(answer.iter_lines()):
                        after, failures = event.id, 0
                        yield event
                        if event.type == "done":
                            return
            except (httpx.TransportError, ServiceError) as error:
                if isinstance(error, ServiceError) and error.status not in (500, 502, 503, 504):
                    raise
                failures += 1
                if isinstance(error, httpx.TransportError) and self._given_up(error, failures, began):
                    raise self._unreachable(f"; job {job_id} goes on when it is back") from error
                if failures > RETRIES:
                    raise
            time.sleep(min(5.0, 0.3 * 2**failures))

    def wait(self, job_id: str) -> ReconstructionView:
        for _ in self.events(job_id):
            pass
        return self.get(job_id)

    def download(self, job_id: str, folder: Path) -> dict[str, Path]:
        """All artifacts, each checked against its sha256."""
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, Path] = {}
        for artifact in self.get(job_id).artifacts:
            path = folder / Path(artifact.name).name
            body = self._get(artifact.url).content
            if hashlib.sha256(body).hexdigest() != artifact.sha256:
                raise ServiceError(
                    502, {"detail": f"{artifact.name} was damaged on the way.", "code": "artifact_corrupt"}
                )
            path.write_bytes(body)
            files[artifact.name] = path
        return files

    def _get(self, url: str) -> httpx.Response:
        return self._ask(lambda: self.http.get(url))

    def _ask(self, send: Any) -> httpx.Response:
        """Repeats what can be repeated: a broken connection, and 503 and 429 with their Retry-After."""
        began = time.monotonic()
        for attempt in range(RETRIES + 1):
            try:
                answer = send()
            except httpx.TransportError as error:
                if self._given_up(error, attempt + 1, began):
                    raise self._unreachable() from error
                time.sleep(min(5.0, 0.3 * 2**attempt))
                continue
            self.answered = True
            if answer.status_code in (429, 502, 503, 504) and attempt < RETRIES and _passing(answer):
                time.sleep(min(30.0, float(answer.headers.get("retry-after", 0.3 * 2**attempt))))
                continue
            _check(answer)
            return answer
        raise AssertionError("unreachable")

    def _given_up(self, error: httpx.TransportError, failures: int, began: float) -> bool:
        """Whether trying once more, after so many failures, is not worth waiting for."""
        if self.answered or not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return failures > RETRIES
        return time.monotonic() - began + 0.3 * 2 ** (failures - 1) > PATIENCE_S

    def _unreachable(self, what_then: str = "") -> ServiceError:
        if self.answered:
            return ServiceError(503, {"detail": f"The service at {self.url} no longer answers{what_then}."})
        hint = "Start one with viewmesh serve, or name another with --url."
        return ServiceError(503, {"detail": f"No service answers at {self.url}.", "hint": hint})


def _check_url(url: str) -> None:
    try:
        parsed = httpx.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host:
            return
    except httpx.InvalidURL:
        pass
    raise OptionError(f"--url must begin with http:// or https:// and name a host, not {url!r}.")


def _timeout(seconds: float, *, read: float | None = None) -> httpx.Timeout:
    return httpx.Timeout(seconds, read=read or seconds, connect=min(seconds, CONNECT_S))


def files_of(source: Path, scratch: Path) -> list[tuple[str, Path]]:
    """(field, file) of a view set in a folder, or the zip itself. With a camera file, which may name its pictures
    anywhere below the folder, or with very many views it is a zip written into scratch. Raises InputError."""
    if source.is_file():
        if not zipfile.is_zipfile(source):
            raise InputError("this is no zip; give a folder of pictures or a zip.", file=source.name)
        return [("archive", source)]
    files = find_files(source)
    if files.camera_file is not None or len(files.views) > Limits().views:
        return [("archive", _packed(files, scratch / "views.zip"))]
    fields = {"views": files.views, "masks": files.masks, "depth": files.depths}
    return [(field, files.root / name) for field, names in fields.items() for name in names]


def _packed(files: Files, archive: Path) -> Path:
    """A zip of what a job with these files reads; equal for equal files."""
    names = {*files.views, *files.masks, *files.depths}
    if files.camera_file is not None:
        from viewmesh.views.cameras_file import named_files, read_cameras  # OpenCV comes with it

        cameras = read_cameras(files.root / files.camera_file, files.camera_file, Limits(), poses=False)
        views, masks, depths = named_files(files.root, cameras)
        names = {files.camera_file, *views, *(masks or files.masks), *(depths or files.depths)}
    with zipfile.ZipFile(archive, "w") as packed:  # pictures are compressed already
        for name in sorted(names):
            with open(files.root / name, "rb") as picture, packed.open(zipfile.ZipInfo(name), "w") as entry:
                shutil.copyfileobj(picture, entry)
    return archive


def _passing(answer: httpx.Response) -> bool:
    """Whether a refusal may be over soon: a missing model is not, nor a day's quota."""
    try:
        return answer.json().get("code") not in ("model_missing", "upload_quota")
    except ValueError:
        return True  # Serve's own words while a Router starts


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    answer.read()
    try:
        body = answer.json()
    except ValueError:
        said = answer.text.strip()
        page = f"{answer.url} answered {answer.status_code} with a page; --url must be that of the service."
        body = {"detail": page if said.startswith("<") else said[:200]}
    raise ServiceError(answer.status_code, body if isinstance(body, dict) else {})


def _parse(lines: Iterator[str]) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if not line:
            if "id" in fields and "data" in fields:
                yield Event(int(fields["id"]), fields.get("event", "message"), json.loads(fields["data"]))
            fields = {}
            continue
        name, _, value = line.partition(":")
        fields[name] = value.removeprefix(" ")
