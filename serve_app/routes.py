"""The HTTP API: typed routes over the job store. Nothing here computes.

Here are the application and its small routes; those of the jobs are in `reconstructions`.
"""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import viewmesh
from serve_app import models
from serve_app.dependencies import Serving
from serve_app.metrics import exposition
from serve_app.openapi import PROBLEMS, describe
from serve_app.problems import MEDIA_TYPE, ProblemError, of_http, of_library, of_validation
from serve_app.reconstructions import jobs_api
from serve_app.schemas import (
    Health,
    ModelList,
    ModelView,
)
from viewmesh.errors import ViewmeshError

if TYPE_CHECKING:
    from serve_app.router import Service

STATIC = Path(__file__).parent / "static"

api = APIRouter()


@api.get(
    "/v1/models",
    response_model=ModelList,
    tags=["models"],
    responses={k: v for k, v in PROBLEMS.items() if k in (401, 403, 503)},
)
async def list_models(s: Serving) -> ModelList:
    found = []
    for model in models.MODELS.values():
        state = model.readiness(s.args)
        if state.ready:
            state = await s.replicas.readiness(model)
        found.append(
            ModelView(
                name=model.name,
                ready=state.ready,
                reason=state.reason,
                hint=state.hint,
                description=model.description,
                licence=model.licence,
                vram_bytes=model.vram_bytes,
                options=models.options_schema(model),
            )
        )
    return ModelList(models=found, default=next((model.name for model in found if model.ready), None))


@api.head("/livez", name="livez_head", tags=["probes"])
@api.get("/livez", response_model=Health, tags=["probes"])
async def livez() -> Health:
    return Health(status="ok")


@api.head(
    "/readyz",
    name="readyz_head",
    response_class=Response,
    tags=["probes"],
    responses={503: {"description": "Not ready."}},
)
@api.get("/readyz", response_model=Health, tags=["probes"], responses={503: {"model": Health}})
async def readyz(s: Serving) -> Response:
    checks = await s.probes.answers()
    try:
        await asyncio.wait_for(_conductor_ready(s), 3)
        checks["conductor"] = "ok"
    except Exception as error:
        checks["conductor"] = type(error).__name__
    good = all(value == "ok" for value in checks.values())
    value = Health(status="ok" if good else "unavailable", checks=checks)
    return JSONResponse(
        value.model_dump(), status_code=200 if good else 503, headers={} if good else {"Retry-After": "5"}
    )


@api.get("/metrics", response_class=Response, tags=["probes"], responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request, s: Serving) -> Response:
    if not s.config.metrics:
        raise ProblemError(404, "not_found", "Metrics are switched off.")
    body, content_type = await asyncio.to_thread(exposition, s.store, request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})


@api.head("/", include_in_schema=False)
@api.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(STATIC / "index.html", media_type="text/html")


@api.get("/docs", include_in_schema=False)
async def docs(s: Serving) -> Response:
    if not s.config.docs:
        raise ProblemError(404, "not_found", "The documentation is switched off.")
    return FileResponse(STATIC / "docs.html", media_type="text/html")


@api.get("/openapi.json", include_in_schema=False)
async def schema(request: Request, s: Serving) -> Response:
    if not s.config.docs:
        raise ProblemError(404, "not_found", "The documentation is switched off.")
    return JSONResponse(request.app.openapi())


@api.get("/static/{name}", include_in_schema=False)
async def static(name: str) -> Response:
    if name not in ("page.css", "page.js", "viewer.js", "docs.js"):
        raise ProblemError(404, "not_found", f"There is no {name!r}.")
    return FileResponse(STATIC / name, media_type="text/css" if name.endswith(".css") else "text/javascript")


def application(state: "Service") -> FastAPI:
    """The FastAPI application of one Router replica. The edge goes around it."""
    app = FastAPI(
        title="viewmesh",
        version=viewmesh.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        summary="Photos of an object in, a textured PBR mesh out.",
    )
    app.state.service = state
    app.include_router(jobs_api)
    app.include_router(api)
    describe(app)
    app.add_middleware(Bodiless)

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            found = of_validation([{"loc": item["loc"], "msg": item["msg"]} for item in error.errors()])
        elif isinstance(error, HTTPException):
            found = of_http(error)
            if error.status_code == 405:  # the framework names the methods of the first route that it saw only
                found.headers = {**(found.headers or {}), "Allow": ", ".join(_methods(request.scope))}
        else:
            found = of_library(error)
        return Response(
            found.body(request.state.request_id),
            found.status_code,
            media_type=MEDIA_TYPE,
            headers=dict(found.headers or {}),
        )

    for kind in (RequestValidationError, HTTPException, ViewmeshError, Exception):
        app.add_exception_handler(kind, answer)
    return app


class Bodiless:
    """The answer to a HEAD is that to its GET without the body, also where it is a problem."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app(scope, receive, head if scope.get("method") == "HEAD" else send)


def _methods(scope: Any) -> list[str]:
    """What the path of a request can be asked."""
    found: set[str] = set()
    for route in (*jobs_api.routes, *api.routes):
        match, _ = route.matches({**scope, "method": "GET"})
        if match is not Match.NONE and isinstance(route, APIRoute):
            found |= route.methods or set()
    return sorted(found)


async def _conductor_ready(s: Any) -> None:
    await s.conductor.ready.remote()
