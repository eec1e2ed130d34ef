"""What FastAPI cannot tell from the routes: the forms of an upload, the problem answers, the API key."""

from typing import Any

from fastapi import FastAPI

from serve_app.problems import MEDIA_TYPE
from serve_app.schemas import Problem
from viewmesh.options import Options

REASONS = {
    400: "Malformed.",
    401: "No valid API key.",
    403: "Without keys: another site's page, or not this machine's name.",
    404: "Not there, or not yours.",
    405: "Method not allowed.",
    406: "Not acceptable.",
    408: "The body came too slowly.",
    409: "Not in this state.",
    413: "Too large.",
    415: "Unsupported media type.",
    416: "No such range.",
    422: "Cannot be honoured.",
    429: "Too many; Retry-After.",
    500: "Our fault.",
    503: "Try again later; Retry-After.",
}

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    for status, text in REASONS.items()
}

_BINARY = {"type": "string", "contentMediaType": "application/octet-stream"}
_FILES = {"type": "array", "items": _BINARY}
_OPTIONS = {"$ref": "#/components/schemas/Options"}


def _links(*operations: str) -> dict[str, Any]:
    """Where the id of the answer leads."""
    return {name: {"operationId": name, "parameters": {"job_id": "$response.body#/id"}} for name in operations}


def _text(name: str, where: str, description: str, *, pattern: str | None = None, example: str = "") -> dict[str, Any]:
    """A parameter that may be left out."""
    schema = {"type": "string", **({"pattern": pattern} if pattern else {})}
    return {
        "name": name,
        "in": where,
        "schema": schema,
        "description": description,
        **({"example": example} if example else {}),
    }


_SUBMITTING = [
    _text(
        "Idempotency-Key",
        "header",
        "The same key and body give the same job; another body is refused with 422.",
        pattern="^[!-~]{1,255}$",
    ),
    _text("Prefer", "header", "wait=N answers when the job is over, or after N seconds.", example="wait=60"),
]
_OVER = {
    "description": "With `Prefer: wait`: the job is over.",
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/ReconstructionView"}},
        "model/gltf-binary": {"schema": _BINARY},
    },
}
_UNCHANGED = _text("If-None-Match", "header", "ETags that the caller has: 304 if the file's is among them.")

EXPORT: dict[str, Any] = {"parameters": _SUBMITTING, "responses": {"200": _OVER}}
EVENTS: dict[str, Any] = {
    "parameters": [
        _text("Last-Event-ID", "header", "Events after this one. Anything but a number is ignored.", example="3"),
        _text("last_event_id", "query", "The same, for who cannot send the header.", example="3"),
    ]
}
HEAD: dict[str, Any] = {"parameters": [_UNCHANGED]}
ARTIFACT: dict[str, Any] = {
    "parameters": [
        _UNCHANGED,
        _text("Range", "header", "One range of bytes; with several the whole file comes.", example="bytes=0-1023"),
        _text("If-Range", "header", "The ETag that Range is meant for: another one gets the whole file."),
    ]
}
UPLOAD: dict[str, Any] = {
    "parameters": [*_SUBMITTING, _text("options", "query", "The options as JSON, of an application/zip body.")],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "views": {**_FILES, "description": "1 to 64 pictures: PNG, JPEG, WebP."},
                        "masks": _FILES,
                        "depth": _FILES,
                        "cameras": _BINARY,
                        "archive": {**_BINARY, "description": "A zip of a view set, instead of single files."},
                        "options": _OPTIONS,
                        "webhook_url": {"type": "string", "format": "uri"},
                        "image_urls": {"type": "array", "items": {"type": "string", "format": "uri"}},
                    },
                    "additionalProperties": False,
                },
                "encoding": {
                    "options": {"contentType": "application/json"},
                    "image_urls": {"contentType": "application/json"},
                },
            },
            "application/zip": {"schema": _BINARY},
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["image_urls"],
                    "additionalProperties": False,
                    "properties": {
                        "image_urls": {
                            "type": "array",
                            "minItems": 1,
                            "maxItems": 64,
                            "items": {"type": "string", "format": "uri"},
                        },
                        "options": _OPTIONS,
                        "webhook_url": {"type": "string", "format": "uri"},
                    },
                }
            },
        },
    },
    "responses": {
        "202": {"links": _links("show", "events", "cancel", "delete", "export")},
        "200": {"links": _links("show", "events", "delete", "export"), **_OVER},
    },
}


def describe(app: FastAPI) -> None:
    """Completes the app's OpenAPI document, once, when it is first asked for."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            parts = document.setdefault("components", {}).setdefault("schemas", {})
            for model in (Problem, Options):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                parts.update(schema.pop("$defs", {}))
                parts[model.__name__] = schema
            document["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            document["security"] = [{}, {"bearer": []}, {"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]
