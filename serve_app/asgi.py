"""The edge: plain ASGI around the application. Request ids, header hygiene, who calls, how many at once, problem+json.

It is not a Starlette application on purpose: Serve adds handlers of its own to those, which answer in plain text.
"""

import ipaddress
import logging
import re
import uuid
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.auth import Caller
from serve_app.problems import MEDIA_TYPE, ProblemError, of_http, of_library
from serve_app.settings import RouterConfig
from viewmesh.errors import ViewmeshError

log = logging.getLogger("ray.serve")

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})")  # in Prefer, RFC 7240
OPEN_PATHS = ("/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/", "/favicon.ico")
PAGE_CSP = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    b"media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DATA_CSP = b"default-src 'none'; frame-ancestors 'none'; sandbox"

Identify = Callable[[str | None, str | None], Caller | None]


class Edge:
    """app: the FastAPI application. identify: (Authorization, X-API-Key) → who calls. config: read at each request.

    local_only: there are no keys, and only who is on this machine shall use it; see _refuse_other_sites.
    """

    def __init__(
        self,
        app: ASGIApp,
        identify: Identify,
        config: Callable[[], RouterConfig],
        *,
        local_only: bool = False,
        echo_request_id: bool = True,
    ) -> None:
        self.app = app
        self.identify = identify
        self.config = config
        self.local_only = local_only
        self.echo_request_id = echo_request_id  # False behind a proxy that adds the header itself, as Serve's does
        self.requests = 0
        self.streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope["headers"] = [(k, v) for k, v in scope["headers"] if k != b"x-request-id"]
        scope["headers"].append((b"x-request-id", request_id.encode()))
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(send, request_id, scope["path"], self.echo_request_id)
        streaming = _is_stream(scope)
        try:
            self._admit(streaming)
        except ProblemError as error:
            await answer.problem(error)
            return
        try:
            if self.local_only:
                _refuse_other_sites(scope)
            scope["state"]["caller"] = self._caller(scope)
            await self.app(scope, self._bounded(scope, receive), answer.send)
        except ViewmeshError as error:
            await answer.problem(of_library(error))
        except HTTPException as error:
            await answer.problem(of_http(error))
        except Exception:
            log.exception(f"request {request_id} failed: {scope['method']} {scope['path']}")
            await answer.problem(
                ProblemError(
                    500,
                    "internal_error",
                    "The request failed unexpectedly.",
                    hint=f"Tell the operator the request id {request_id}.",
                )
            )
        finally:
            if streaming:
                self.streams -= 1
            else:
                self.requests -= 1

    def _admit(self, streaming: bool) -> None:
        limits = self.config().limits
        if streaming:
            if self.streams >= limits.streams:
                raise ProblemError(503, "busy", "Too many open event streams.", hint="Poll instead.", retry_after_s=10)
            self.streams += 1
        else:
            if self.requests >= limits.requests:
                raise ProblemError(503, "busy", "Too many requests at once.", retry_after_s=1)
            self.requests += 1

    def _caller(self, scope: Scope) -> Caller | None:
        headers = dict(scope["headers"])
        texts = [
            headers[name].decode("latin-1") if name in headers else None for name in (b"authorization", b"x-api-key")
        ]
        caller = self.identify(*texts)
        if caller is None and not _is_for_all(scope["path"]):
            raise ProblemError(
                401,
                "unauthorized",
                "A valid API key is needed.",
                hint="Send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return caller

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Bodies other than uploads are small. An upload counts its own bytes."""
        if scope["path"] == "/v1/reconstructions":
            return receive
        limit, seen = self.config().limits.field_bytes, 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise ProblemError(413, "too_large", f"The body is larger than {limit} bytes.")
            return message

        return bounded


class _Answer:
    """Adds the headers that every answer has; sends a problem if nothing was sent yet."""

    def __init__(self, send: Send, request_id: str, path: str, echo: bool) -> None:
        self._send, self._request_id, self._path, self._echo = send, request_id, path, echo
        self._started = self._finished = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            have = {name.lower() for name, _ in message["headers"]}
            message = {**message, "headers": [*message["headers"], *(h for h in self._common() if h[0] not in have)]}
        elif message["type"] == "http.response.body":
            self._finished = not message.get("more_body", False)
        await self._send(message)

    def _common(self) -> list[tuple[bytes, bytes]]:
        page = self._path in ("/", "/docs") or self._path.startswith("/static/")
        echoed = [(b"x-request-id", self._request_id.encode())] if self._echo else []
        return [
            *echoed,
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"content-security-policy", PAGE_CSP if page else DATA_CSP),
            (b"cache-control", b"no-cache" if page else b"no-store"),
        ]

    async def problem(self, error: ProblemError) -> None:
        if self._finished:  # answered already, by the application's own handlers
            return
        if self._started:  # too late for a status: break the connection off, so that the body cannot pass for whole
            raise error
        body = error.body(self._request_id)
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
        headers += [(k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items()]
        await self.send({"type": "http.response.start", "status": error.status_code, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return value.decode()
    return str(uuid.uuid4())


def _is_for_all(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/static/")


def _refuse_other_sites(scope: Scope) -> None:
    """Raises ProblemError 403 for what the page of another site makes its visitor's browser ask of this machine.

    Two ways lead here: a form sent to 127.0.0.1, which its Origin tells, and a name of the site's own that resolves to
    127.0.0.1 (DNS rebinding), which Host tells. Addresses, and names that nobody can register, are no such names.
    """
    headers = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
    host, origin = headers.get(b"host", ""), headers.get(b"origin")
    if not _is_for_all(scope["path"]) and not _is_near(host):
        raise _forbidden(f"The name {host[:200]!r} is not one of this machine's.")
    if scope["method"] in ("GET", "HEAD", "OPTIONS") or origin is None:  # who is no browser sends no Origin
        return
    site = headers.get(b"sec-fetch-site")  # the browser's own judgement: right behind a proxy that rewrites Host, too
    ours = site in ("same-origin", "none") if site else origin.partition("://")[2] == host
    if not ours:
        raise _forbidden(f"The page of {origin[:200]!r} may not use this service.")


def _is_near(host: str) -> bool:
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if "." not in name or name.endswith((".localhost", ".local", ".internal")):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _forbidden(detail: str) -> ProblemError:
    hint = "Set auth.keys_file (viewmesh config key OWNER), or auth.open: true where others shall use it without keys."
    return ProblemError(403, "forbidden", detail, hint=hint)


def _is_stream(scope: Scope) -> bool:
    if scope["method"] == "POST":
        return any(name == b"prefer" and WAIT.search(value.decode("latin-1")) for name, value in scope["headers"])
    return scope["path"].endswith("/events")
