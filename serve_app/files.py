"""A committed file as an HTTP answer: HEAD, ETag, If-None-Match, one byte range (RFC 9110), streamed from any store."""

import re
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from fastapi.responses import Response, StreamingResponse
from starlette.requests import Request

from deployments.artifacts import ArtifactStore, Missing
from serve_app.problems import ProblemError
from serve_app.transfers import transfer

BLOCK = 256 * 1024
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


async def file_response(
    request: Request, store: ArtifactStore, row: dict[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    """200, 206 or 304; raises ProblemError 404 and 416, StoreError. `row` is one of the job store's artifacts."""
    size, etag = row["size"], f'"{row["sha256"]}"'
    head = {
        **(headers or {}),
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f'attachment; filename="{row["name"]}"',
    }
    if _matches(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=head)
    if request.method == "HEAD":  # which knows no ranges
        return Response(headers={**head, "Content-Length": str(size)}, media_type=row["media_type"])
    part = _part(request, size, etag)
    start, end = part or (0, size)
    blocks = store.read(row["key"], start, end, BLOCK)
    try:
        first = await transfer(next, blocks, b"")  # before the headers: a store that is away is a 503
    except Missing as error:
        raise ProblemError(
            404, "not_found", f"The file {row['name']!r} is gone.", hint="The job's status lists those that are there."
        ) from error
    head["Content-Length"] = str(end - start)
    if part is not None:
        head["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return StreamingResponse(
        _stream(first, blocks), status_code=206 if part else 200, headers=head, media_type=row["media_type"]
    )


async def _stream(first: bytes, blocks: Iterator[bytes]) -> AsyncIterator[bytes]:
    block = first
    while block:
        yield block
        block = await transfer(next, blocks, b"")


def _part(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """[start, end) of the one range asked for; None for the whole. Several ranges are answered with the whole."""
    text = request.headers.get("range", "").strip()
    condition = request.headers.get("if-range")
    found = RANGE.fullmatch(text)
    if found is None or (condition is not None and condition.strip() != etag) or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:  # the last so many bytes
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return None
    if start >= size or start >= end:
        raise ProblemError(
            416, "no_such_range", f"The file has {size} bytes.", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, end


def _matches(text: str, etag: str) -> bool:
    return text.strip() == "*" or etag in [item.strip().removeprefix("W/") for item in text.split(",")]
