"""Errors on the wire: RFC 9457 problem+json with a stable code, a hint and the request's id. Never a traceback."""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from deployments.artifacts import StoreError
from serve_app.outbound import Refused
from viewmesh.errors import InputError, MissingModel, OptionError

MEDIA_TYPE = "application/problem+json"
NO_OBJECT = "Send a JSON object, with the header content-type: application/json."

TITLES = {
    400: "Bad request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    408: "Request timeout",
    409: "Conflict",
    410: "Gone",
    411: "Length required",
    413: "Content too large",
    415: "Unsupported media type",
    416: "Range not satisfiable",
    422: "Unprocessable content",
    429: "Too many requests",
    431: "Header fields too large",
    500: "Internal error",
    503: "Service unavailable",
}

CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    429: "too_many_requests",
    503: "unavailable",
}


class ProblemError(HTTPException):
    """Raised anywhere in a request; answered as it stands."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        hint: str = "",
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        merged = dict(headers or {})
        if retry_after_s is not None:
            merged["Retry-After"] = str(retry_after_s)
        super().__init__(status, detail, merged)
        self.code, self.hint, self.extra = code, hint, extra

    def body(self, request_id: str) -> bytes:
        return problem(self.status_code, self.code, self.detail, hint=self.hint, request_id=request_id, **self.extra)


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    hint: str = "",
    request_id: str = "",
    errors: list | None = None,
    **extra: Any,
) -> bytes:
    """The body. `type` is a name, not a page: what matters is `code`."""
    value = {
        "type": f"urn:viewmesh:problem:{code}",
        "title": TITLES.get(status, "Error"),
        "status": status,
        "detail": detail,
        "code": code,
        "hint": hint,
        "request_id": request_id,
        "errors": errors or [],
        **extra,
    }
    return json.dumps(value).encode()


def of_library(error: Exception) -> ProblemError:
    """The answer to an error raised while a request was handled; of those that are not ours it says nothing."""
    if isinstance(error, StoreError):
        return ProblemError(503, error.code, str(error), hint=error.hint, retry_after_s=10)
    if isinstance(error, MissingModel):
        return ProblemError(503, error.code, str(error), hint=error.hint)
    if isinstance(error, InputError | OptionError | Refused):
        return ProblemError(422, error.code, str(error), hint=error.hint)
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout):
        return ProblemError(503, "database_unavailable", "The job database cannot be reached.", retry_after_s=5)
    return ProblemError(500, "internal_error", "The request failed unexpectedly.")


def of_http(error: HTTPException) -> ProblemError:
    """The answer to an error that the framework raised: 404 for an unknown path, 405, a broken body."""
    if isinstance(error, ProblemError):
        return error
    code = CODES.get(error.status_code, "error")
    return ProblemError(error.status_code, code, str(error.detail), headers=error.headers)


def of_validation(errors: list[dict[str, Any]]) -> ProblemError:
    """The answer to pydantic's errors: one sentence for the first, and where each one is."""
    found = [{"pointer": pointer(item["loc"]), "detail": item["msg"]} for item in errors[:20]]
    first = found[0] if found else {"pointer": "", "detail": "invalid"}
    hint = NO_OBJECT if first["pointer"] == "/body" else ""
    return ProblemError(422, "invalid_option", f"{first['pointer'] or '/'}: {first['detail']}", hint=hint, errors=found)


def pointer(location: tuple[Any, ...]) -> str:
    """A JSON pointer."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in location)
