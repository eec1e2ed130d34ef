"""The routes below /v1/reconstructions: jobs, their events and files."""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments.artifacts import StoreError
from serve_app import models
from serve_app.asgi import WAIT
from serve_app.auth import Caller
from serve_app.conductor import forget
from serve_app.dependencies import By, Serving
from serve_app.events import encode
from serve_app.files import file_response
from serve_app.jobs import DifferentRequest, InputGone, NewJob, id_of_key, new_id
from serve_app.openapi import ARTIFACT, EVENTS, EXPORT, HEAD, PROBLEMS, UPLOAD
from serve_app.outbound import check_url
from serve_app.problems import MEDIA_TYPE, ProblemError
from serve_app.quotas import Quota, TooManyJobs, TooMuchSent
from serve_app.schemas import (
    TERMINAL,
    ExportRequest,
    ReconstructionList,
    ReconstructionView,
    State,
)
from serve_app.uploads import Reader, Upload, too_much_today
from serve_app.views import reconstruction_view
from viewmesh.errors import ViewmeshError
from viewmesh.options import Options

log = logging.getLogger("ray.serve")
STOP_S = 1.0  # so long the answer to a cancellation waits for the running call to be told
KEY = re.compile(r"[\x21-\x7e]{1,255}")
PRINTABLE = r"^[^\x00-\x1f\x7f]+$"  # Postgres refuses NUL
JobId = Annotated[
    str, PathParameter(max_length=64, pattern=PRINTABLE, description="The id that POST /v1/reconstructions gave.")
]

jobs_api = APIRouter(prefix="/v1/reconstructions", tags=["reconstructions"], responses=PROBLEMS)


@jobs_api.post(
    "", status_code=202, response_model=ReconstructionView, openapi_extra=UPLOAD, summary="Reconstruct an object"
)
async def create(request: Request, s: Serving, by: By) -> Response:
    key = _key_of(request)
    wait_s = _wait_of(request, s)
    job_id = id_of_key(by.owner, key) if key else new_id()
    with _refusals(_quota_of(s, by)):
        left = await asyncio.to_thread(s.store.left_today, by.owner, job_id, _quota_of(s, by))
    reader = Reader(s.config.limits, s.artifacts, s.args.outbound, quota=left)
    try:
        upload = await reader.read(request)
        row = await _accept(s, by, await _new_job(s, by, job_id, upload))
    except (ProblemError, ViewmeshError) as error:
        ours = isinstance(error, StoreError) or (isinstance(error, ProblemError) and error.status_code >= 500)
        if left is not None and reader.total and not ours:  # it was written down all the same
            await asyncio.to_thread(s.store.charge, by.owner, reader.total)
        raise
    return await _answer(request, s, by, row, wait_s)


@jobs_api.get("", response_model=ReconstructionList, summary="List, newest first")
async def index(
    request: Request,
    s: Serving,
    by: By,
    state: State | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    before = None if cursor is None else _decode_cursor(cursor)
    rows = await asyncio.to_thread(s.store.page, by.owner, state=state, limit=limit + 1, before=before)
    more, rows = len(rows) > limit, rows[:limit]
    files = await asyncio.to_thread(s.store.artifacts, [row["id"] for row in rows])
    after = _encode_cursor(rows[-1]) if more else None
    value = ReconstructionList(items=[reconstruction_view(row, files[row["id"]], None) for row in rows], next=after)
    headers = {}
    if after:
        url = request.url.include_query_params(cursor=after)
        headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    return JSONResponse(value.model_dump(mode="json"), headers=headers)


@jobs_api.get("/{job_id}", response_model=ReconstructionView, summary="State, progress, artifacts, report")
async def show(job_id: JobId, s: Serving, by: By) -> Response:
    view = await _view(s, by, job_id)
    headers = {} if view.state in TERMINAL else {"Retry-After": "1"}
    return Response(view.model_dump_json(), media_type="application/json", headers=headers)


@jobs_api.post(
    "/{job_id}/cancel", status_code=202, response_model=ReconstructionView, summary="Cancel, also while it runs"
)
async def cancel(job_id: JobId, s: Serving, by: By) -> Response:
    await _view(s, by, job_id)
    await _cancel(s, job_id)
    view = await _view(s, by, job_id)
    if view.state in ("succeeded", "failed"):
        raise ProblemError(
            409, "already_over", f"The job has {view.state} already.", hint="DELETE it to remove its data."
        )
    return Response(view.model_dump_json(), status_code=202, media_type="application/json")


@jobs_api.delete("/{job_id}", status_code=204, response_class=Response, summary="Delete it and all its data")
async def delete(job_id: JobId, s: Serving, by: By) -> Response:
    await _view(s, by, job_id)
    family = await asyncio.to_thread(s.store.family, job_id)
    await asyncio.gather(*(_cancel(s, member) for member in family))
    await asyncio.to_thread(forget, s.store, s.workflows, s.artifacts, job_id, by.owner)
    return Response(status_code=204)


@jobs_api.post(
    "/{job_id}/exports",
    status_code=202,
    response_model=ReconstructionView,
    openapi_extra=EXPORT,
    summary="Another format, face count or texture size without running the model",
)
async def export(job_id: JobId, body: ExportRequest, request: Request, s: Serving, by: By) -> Response:
    row = await asyncio.to_thread(s.store.get, job_id, by.owner)
    if row is None:
        raise _unknown(job_id)
    if row["state"] != "succeeded" or not row["result"]:
        raise ProblemError(
            409, "not_finished", f"The reconstruction is {row['state']}; only a succeeded one can be exported."
        )
    if body.webhook_url:
        _check_webhook(s, by, body.webhook_url)
    key = _key_of(request)
    Options(formats=tuple(body.formats)).for_model(row["model"])  # refuses what that model cannot make
    options = dict(row["options"])
    options["formats"] = list(dict.fromkeys(body.formats))
    smaller = {
        name: getattr(body, name) for name in ("target_faces", "texture_size") if getattr(body, name) is not None
    }
    options.update(smaller)
    facts = row["result"]["facts"]  # of an export, with what it was made smaller by
    source = {**row["result"], "facts": {**facts, "reexport": {**facts.get("reexport", {}), **smaller}}}
    job = NewJob(
        id=id_of_key(by.owner, f"{job_id}\n{key}") if key else new_id(),
        owner=by.owner,
        kind="export",
        model=row["model"],
        options=options,
        inputs={},
        request_hash=_hash({**options, "of": job_id, "webhook": body.webhook_url}),
        parent=row["parent"] or row["id"],
        webhook=body.webhook_url,
        result=source,
    )
    return await _answer(request, s, by, await _accept(s, by, job), _wait_of(request, s))


@jobs_api.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    openapi_extra=EVENTS,
    summary="Server-sent events",
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "The job is over and everything was told."},
    },
)
async def events(job_id: JobId, request: Request, s: Serving, by: By) -> Response:
    row = await asyncio.to_thread(s.store.get, job_id, by.owner)
    if row is None:
        raise _unknown(job_id)
    last = request.headers.get("last-event-id", "") or request.query_params.get("last_event_id", "")
    after = min(int(last), row["seq"]) if last.isdecimal() and len(last) < 10 else 0
    if row["state"] in TERMINAL and after >= row["seq"]:
        return Response(status_code=204)  # tells an EventSource not to come back

    async def stream():
        yield b"retry: 1000\n\n"
        async for event in s.hub.listen(job_id, after, s.config.heartbeat_s):
            yield encode(event)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


@jobs_api.head(
    "/{job_id}/artifacts/{name}",
    name="artifact_head",
    response_class=Response,
    openapi_extra=HEAD,
    summary="The headers of a file",
    responses={304: {"description": "Unchanged."}},
)
@jobs_api.get(
    "/{job_id}/artifacts/{name}",
    response_class=Response,
    openapi_extra=ARTIFACT,
    summary="A file; Range and If-None-Match work",
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        206: {"description": "A part of it.", "content": {"application/octet-stream": {}}},
        304: {"description": "Unchanged."},
        416: {"description": "No such range.", "content": {MEDIA_TYPE: {}}},
    },
)
async def artifact(
    job_id: JobId,
    name: Annotated[str, PathParameter(max_length=128, pattern=PRINTABLE)],
    request: Request,
    s: Serving,
    by: By,
) -> Response:
    if await asyncio.to_thread(s.store.get, job_id, by.owner) is None:
        raise _unknown(job_id)
    row = await asyncio.to_thread(s.store.artifact, job_id, name)
    if row is None:
        raise ProblemError(404, "not_found", f"The job has no artifact {name!r}.", hint="Its status lists them.")
    return await file_response(request, s.artifacts, row)


# --- what several routes do ------------------------------------------------------------------------------------------


async def _new_job(s: Any, by: Caller, job_id: str, upload: Upload) -> NewJob:
    if upload.webhook_url:
        _check_webhook(s, by, upload.webhook_url)
    options = upload.options
    broken = await s.replicas.broken(models.served(s.args).values()) if options.model == "auto" else {}
    model, because = models.resolve(options, s.args, upload.files, broken)
    return NewJob(
        id=job_id,
        owner=by.owner,
        kind="reconstruction",
        model=model.name,
        options={**options.model_dump(mode="json"), "model": model.name},
        inputs={name: ref.json() for name, ref in upload.files.items()},
        request_hash=upload.digest(),
        webhook=upload.webhook_url,
        result={"facts": {"chosen_because": because}} if because else None,
    )


async def _accept(s: Any, by: Caller, job: NewJob) -> dict[str, Any]:
    quota = _quota_of(s, by)
    with _refusals(quota):
        async with s.accepting:
            row, _ = await asyncio.to_thread(
                s.store.accept, job, s.workflows.enqueue, quota=quota, missing=s.artifacts.missing
            )
    return row


def _quota_of(s: Any, by: Caller) -> Quota:
    return Quota(by.max_active_jobs or s.args.max_active_jobs, by.upload_bytes_per_day)


@contextlib.contextmanager
def _refusals(quota: Quota) -> Iterator[None]:
    """What the job store refuses, as its caller is told it."""
    try:
        yield
    except DifferentRequest as error:
        raise ProblemError(
            422,
            "idempotency_key_reused",
            "This Idempotency-Key was used for another request.",
            hint="Use a new key for a new request.",
        ) from error
    except InputGone as error:
        raise ProblemError(
            503, "upload_again", "An input was deleted while this request was accepted.", retry_after_s=1
        ) from error
    except TooMuchSent as error:  # beside another upload, each of which would have fitted
        raise too_much_today() from error
    except TooManyJobs as error:
        raise ProblemError(
            429,
            "too_many_jobs",
            f"You have {quota.active_jobs} jobs waiting or running already.",
            hint="Wait for some to end, or cancel them.",
            headers={"Connection": "close"},  # what else was sent is not read
            retry_after_s=30,
        ) from error


async def _answer(request: Request, s: Any, by: Caller, row: dict[str, Any], wait_s: float | None) -> Response:
    """202 and where to look, or after a wait the end itself."""
    url = f"/v1/reconstructions/{row['id']}"
    headers = {"Location": url, "Link": f'<{url}/events>; rel="monitor", <{url}/cancel>; rel="cancel"'}
    if wait_s is not None:
        headers["Preference-Applied"] = f"wait={wait_s:g}"
        await _wait(s, row["id"], wait_s)
    view = await _view(s, by, row["id"])
    if wait_s is not None and view.state == "succeeded" and "model/gltf-binary" in request.headers.get("accept", ""):
        glb = await asyncio.to_thread(s.store.artifact, row["id"], "mesh.glb")
        if glb is None:
            raise ProblemError(406, "no_glb", "The reconstruction has no GLB.", hint="Add glb to options.formats.")
        return await file_response(request, s.artifacts, glb, headers)
    over = view.state in TERMINAL
    if not over:
        headers["Retry-After"] = "1"
    status = 200 if over and wait_s is not None else 202
    return Response(view.model_dump_json(), status_code=status, media_type="application/json", headers=headers)


async def _wait(s: Any, job_id: str, seconds: float) -> None:
    async def until_over() -> None:
        async for _ in s.hub.listen(job_id):
            pass

    try:
        await asyncio.wait_for(until_over(), seconds)
    except TimeoutError:
        return


async def _view(s: Any, by: Caller, job_id: str) -> ReconstructionView:
    found = await asyncio.to_thread(s.store.view, job_id, by.owner)
    if found is None:
        raise _unknown(job_id)
    return reconstruction_view(*found)


async def _cancel(s: Any, job_id: str) -> None:
    """The row first, which no worker can undo; then the workflow; then, to be quick about it, the running call. The
    answer waits for none of those who work: the job is over, they stop when they can. What half failed before is done
    again: of a row that is cancelled already, the workflow may still run."""
    expires = None if s.args.retention_s is None else time.time() + s.args.retention_s
    if not await asyncio.to_thread(s.store.cancel, job_id, expires):
        return
    await asyncio.to_thread(s.workflows.cancel, job_id)
    telling = asyncio.create_task(_stop(s, job_id))
    s.telling.add(telling)
    telling.add_done_callback(s.telling.discard)
    await asyncio.wait({telling}, timeout=STOP_S)


async def _stop(s: Any, job_id: str) -> None:
    try:
        await s.conductor.stop.remote(job_id)
    except Exception as error:
        log.info(
            f"the Conductor could not be told of a cancellation ({type(error).__name__}); its own watch will see it"
        )


def _key_of(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not KEY.fullmatch(key):
        raise ProblemError(400, "bad_idempotency_key", "Idempotency-Key must be 1 to 255 visible ASCII characters.")
    return key


def _check_webhook(s: Any, by: Caller, url: str) -> None:
    if not (s.keys.webhook_secret(by.owner) or s.args.outbound.webhook_secret):
        raise ProblemError(
            422, "webhooks_disabled", "This service has no webhook secret.", hint="Use the event stream."
        )
    if len(url) > 2048:
        raise ProblemError(422, "invalid_request", "webhook_url is longer than 2048 characters.")
    check_url(url, private_addresses=s.args.outbound.private_addresses)


def _wait_of(request: Request, s: Any) -> float | None:
    """Seconds of `Prefer: wait=N`, RFC 7240; None without it. A preference that makes no sense is ignored."""
    found = WAIT.search(request.headers.get("prefer", ""))
    return None if found is None else min(float(found.group(1)), s.config.limits.wait_s)


def _unknown(job_id: str) -> ProblemError:
    return ProblemError(404, "not_found", f"There is no reconstruction {job_id!r}.")


def _encode_cursor(row: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(f"{row['created']!r}|{row['id']}".encode()).decode().rstrip("=")


def _decode_cursor(cursor: str) -> tuple[float, str]:
    try:
        created, _, job_id = (
            base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode().partition("|")
        )
        if not job_id.isprintable():
            raise ValueError("not an id")
        return float(created), job_id
    except (ValueError, binascii.Error) as error:
        raise ProblemError(400, "bad_cursor", "The cursor is not one of ours.", hint="Start without one.") from error


def _hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
