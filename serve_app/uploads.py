"""A request's body → committed inputs, in one pass over the raw stream, with every byte counted.

Forms: multipart/form-data, application/zip (options in the query), and application/json (options, image_urls). Nothing
is decoded here: pictures and archives are opened in the Preprocessor only.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from deployments.artifacts import ArtifactStore, Ref, StoreFull
from serve_app import outbound
from serve_app.problems import ProblemError, of_validation
from serve_app.settings import Limits, Outbound
from serve_app.transfers import transfer
from viewmesh.options import Options
from viewmesh.views.find import paired

T = TypeVar("T")
LISTS = {"views": "view", "masks": "mask", "depth": "depth"}
SINGLES = {"cameras": "cameras.json", "archive": "archive.zip"}
TEXTS = ("options", "webhook_url", "image_urls")
SPILL_BYTES = 1 << 20  # of a part that was taken from the request and is not yet written
SAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class File:
    field: str
    filename: str
    ref: Ref


@dataclass
class Upload:
    """What was sent: files by the name that they have in the view set, checked options, where to tell of the end."""

    options: Options
    files: dict[str, Ref]
    webhook_url: str | None

    def digest(self) -> str:
        """Equal for equal requests."""
        value = {
            "options": self.options.model_dump(mode="json"),
            "webhook": self.webhook_url,
            "files": {name: ref.sha256 for name, ref in sorted(self.files.items())},
        }
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Reader:
    """Reads one request. `quota`: bytes that its sender may still send today; None: as many as one request may."""

    def __init__(self, limits: Limits, store: ArtifactStore, rules: Outbound, *, quota: int | None = None) -> None:
        self.limits, self.store, self.rules, self.quota = limits, store, rules, quota
        self.deadline = time.monotonic() + limits.upload_timeout_s
        self.total = 0

    async def read(self, request: Request) -> Upload:
        length = request.headers.get("content-length", "")
        if length.isdigit():
            self._allow(int(length))
        media, parameters = parse_options_header(request.headers.get("content-type", ""))
        if media == b"multipart/form-data":
            boundary = parameters.get(b"boundary")
            if not boundary:
                raise ProblemError(400, "malformed_body", "The multipart body has no boundary.")
            files, texts = await self._multipart(request, boundary)
        elif media in (b"application/zip", b"application/x-zip-compressed"):
            part = _Part("archive", "archive.zip", self.store, self.limits)
            files, texts = await self._whole(request, part), {"options": request.query_params.get("options", "")}
        elif media == b"application/json":
            files, texts = [], await self._json(request)
        else:
            raise ProblemError(
                415,
                "unsupported_media_type",
                "The body must be multipart/form-data, application/zip or application/json.",
                hint='curl -F views=@front.png -F views=@right.png -F \'options={"preset":"preview"}\' URL',
            )
        options = parse_options(texts.get("options", ""))
        webhook = texts.get("webhook_url", "").strip() or None
        files += await self._fetch(texts.get("image_urls", ""), self.limits.files - len(files))
        return Upload(options, named(files), webhook)

    # --- forms of a body -------------------------------------------------------------------------------------------

    async def _multipart(self, request: Request, boundary: bytes) -> tuple[list[File], dict[str, str]]:
        inbox: list[tuple[str, bytes]] = []
        names = ("part_begin", "part_end", "headers_finished", "end", "header_end")
        callbacks: dict[str, Any] = {f"on_{name}": (lambda name=name: inbox.append((name, b""))) for name in names}
        for name in ("part_data", "header_field", "header_value"):
            callbacks[f"on_{name}"] = lambda data, a, b, name=name: inbox.append((name, data[a:b]))
        commits: list[asyncio.Task[File]] = []  # to disk or to S3, while the next part arrives
        texts: dict[str, str] = {}
        part: _Part | None = None
        head: list[bytes] = [b"", b""]
        headers: dict[bytes, bytes] = {}
        ended = False
        try:
            parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
            async for chunk in self._chunks(request):
                parser.write(chunk)
                for what, data in inbox:
                    if what == "part_begin":
                        headers, head = {}, [b"", b""]
                    elif what == "header_field":
                        head[0] += data
                    elif what == "header_value":
                        head[1] += data
                    elif what == "header_end":
                        headers[head[0].lower()] = head[1]
                        head = [b"", b""]
                    elif what == "headers_finished":
                        if len(commits) + len(texts) >= self.limits.files:
                            raise ProblemError(413, "too_large", f"More than {self.limits.files} parts.")
                        part = self._part(headers)
                    elif what == "part_data" and part is not None:
                        part.add(data)
                    elif what == "part_end" and part is not None:
                        if part.is_text:
                            if part.field in texts:
                                raise ProblemError(400, "malformed_body", f"The field {part.field} is there twice.")
                            texts[part.field] = part.text()
                        else:
                            commits.append(asyncio.create_task(part.commit()))
                        part = None
                    elif what == "end":
                        ended = True
                inbox.clear()
                if part is not None:
                    await part.spill()
            parser.finalize()
            files = [await commit for commit in commits]
        except FormParserError as error:
            raise ProblemError(400, "malformed_body", "The multipart body is malformed.") from error
        finally:
            if part is not None:
                part.discard()
            await asyncio.gather(*commits, return_exceptions=True)
        if not ended:
            raise ProblemError(400, "malformed_body", "The multipart body ends before its last boundary.")
        return files, texts

    def _part(self, headers: dict[bytes, bytes]) -> "_Part":
        disposition, parameters = parse_options_header(headers.get(b"content-disposition", b""))
        name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if disposition != b"form-data" or not name:
            raise ProblemError(400, "malformed_body", "A part has no form-data name.")
        if name not in (*LISTS, *SINGLES, *TEXTS):
            known = ", ".join((*LISTS, *SINGLES, *TEXTS))
            raise ProblemError(422, "unknown_field", f"The field {name[:64]!r} is unknown.", hint=f"Known: {known}.")
        filename = parameters.get(b"filename", b"").decode("utf-8", "replace")
        return _Part(name, filename, self.store, self.limits)

    async def _whole(self, request: Request, part: "_Part") -> list[File]:
        try:
            async for chunk in self._chunks(request):
                part.add(chunk)
                await part.spill()
            return [await part.commit()]
        finally:
            part.discard()

    async def _json(self, request: Request) -> dict[str, str]:
        body = bytearray()
        async for chunk in self._chunks(request):
            body += chunk
            if len(body) > self.limits.field_bytes:
                raise self._too_large("JSON body", self.limits.field_bytes)
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ProblemError(400, "malformed_body", "The body is not JSON.") from error
        if not isinstance(value, dict) or not set(value) <= set(TEXTS):
            raise ProblemError(422, "invalid_request", f"The body must be an object with only {', '.join(TEXTS)}.")
        return {
            key: item if isinstance(item, str) else json.dumps(item) for key, item in value.items() if item is not None
        }

    async def _chunks(self, request: Request) -> AsyncIterator[bytes]:
        """The body's chunks, none of them late, not too many of them."""
        stream = request.stream().__aiter__()
        while True:
            left = min(self.limits.read_timeout_s, self.deadline - time.monotonic())
            try:
                async with asyncio.timeout(max(0.0, left)):
                    chunk = await stream.__anext__()
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise ProblemError(
                    408, "request_timeout", "The body came too slowly.", headers={"Connection": "close"}
                ) from error
            except ClientDisconnect as error:
                raise ProblemError(400, "client_disconnected", "The client went away.") from error
            self.total += len(chunk)
            self._allow(self.total)
            yield chunk

    def _allow(self, total: int) -> None:
        """Raises ProblemError where a request of so many bytes is too large."""
        if total > self.limits.total_bytes:
            raise self._too_large("request", self.limits.total_bytes)
        if self.quota is not None and total > self.quota:
            raise too_much_today()

    async def _fetch(self, text: str, most: int) -> list[File]:
        if not text.strip():
            return []
        if not self.rules.image_urls:
            raise ProblemError(
                422, "image_urls_disabled", "This service does not fetch image_urls.", hint="Upload the views."
            )
        try:
            urls = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProblemError(422, "invalid_request", "image_urls must be a JSON list.") from error
        if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls) or len(urls) > 64:
            raise ProblemError(422, "invalid_request", "image_urls must be a list of at most 64 URLs.")
        if len(urls) > most:
            raise ProblemError(413, "too_large", f"More than {self.limits.files} parts.")
        files = []
        for i, url in enumerate(urls):
            outbound.check_url(url, private_addresses=self.rules.private_addresses)
            try:
                async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                    status, body = await outbound.request(
                        "GET",
                        url,
                        timeout_s=self.rules.timeout_s,
                        max_bytes=self.limits.file_bytes,
                        private_addresses=self.rules.private_addresses,
                    )
            except (
                OSError,
                TimeoutError,
                outbound.httpcore.NetworkError,
                outbound.httpcore.TimeoutException,
                outbound.httpcore.ProtocolError,
            ) as error:
                raise ProblemError(422, "image_url_failed", f"image_urls/{i} could not be fetched.") from error
            if status != 200:
                raise ProblemError(422, "image_url_failed", f"image_urls/{i} answered {status}.")
            self.total += len(body)
            self._allow(self.total)
            part = _Part("views", Path(urlsplit(url).path).name, self.store, self.limits)
            part.add(body)
            files.append(await part.commit())
        return files

    @staticmethod
    def _too_large(what: str, limit: int) -> ProblemError:
        return ProblemError(
            413, "too_large", f"The {what} is larger than {limit} bytes.", headers={"Connection": "close"}
        )


@dataclass
class _Part:
    """One part on its way to the store, hashed and written in threads: the event loop answers others meanwhile."""

    field: str
    filename: str
    store: ArtifactStore
    limits: Limits
    size: int = 0
    arrived: list[bytes] = dataclasses.field(default_factory=list)  # and not yet written
    held: int = 0  # bytes of that
    digest: Any = dataclasses.field(default_factory=hashlib.sha256)
    spool: Path | None = None
    handle: Any = None

    @property
    def is_text(self) -> bool:
        return self.field in TEXTS

    def add(self, data: bytes) -> None:
        self.size += len(data)
        limit = self._limit()
        if self.size > limit:
            raise Reader._too_large(f"field {self.field}", limit)
        self.arrived.append(data)
        self.held += len(data)

    async def spill(self) -> None:
        """Bounds what is held in memory."""
        if self.held >= SPILL_BYTES and not self.is_text:
            await _to_its_end(self._write)

    def _write(self) -> None:
        with _room():
            if self.handle is None:
                self.spool = self.store.spool()
                self.handle = open(self.spool, "wb")  # noqa: SIM115  (closed by commit or discard)
            for data in self.arrived:
                self.digest.update(data)
                self.handle.write(data)
        self.arrived.clear()
        self.held = 0

    def _limit(self) -> int:
        if self.is_text:
            return self.limits.field_bytes
        return self.limits.total_bytes if self.field == "archive" else self.limits.file_bytes

    def text(self) -> str:
        try:
            return b"".join(self.arrived).decode()
        except UnicodeDecodeError as error:
            raise ProblemError(400, "malformed_body", f"The field {self.field} is not UTF-8.") from error

    async def commit(self) -> File:
        if self.size == 0:
            raise ProblemError(422, "empty_file", f"A file of the field {self.field} is empty.")

        def put() -> Ref:
            self._write()
            with _room():
                self.handle.close()
            assert self.spool is not None
            sha256 = self.digest.hexdigest()
            return self.store.put(self.spool, f"inputs/{sha256[:2]}/{sha256}", sha256=sha256, move=True)

        try:
            ref = await _to_its_end(put)
        except BaseException:
            self.discard()
            raise
        self.spool = self.handle = None
        return File(self.field, self.filename, ref)

    def discard(self) -> None:
        if self.handle is not None:
            with contextlib.suppress(OSError):
                self.handle.close()
        if self.spool is not None:
            self.spool.unlink(missing_ok=True)


async def _to_its_end(work: Callable[[], T]) -> T:
    """work() in a thread. Who is cancelled waits for it first: what follows may close and delete its file."""
    running = asyncio.ensure_future(transfer(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


@contextlib.contextmanager
def _room():
    try:
        yield
    except OSError as error:
        raise StoreFull(f"The upload could not be stored: {error.strerror}.") from error


def too_much_today() -> ProblemError:
    return ProblemError(
        429,
        "upload_quota",
        "Your uploads of the last 24 hours are used up.",
        headers={"Connection": "close"},
        retry_after_s=3600,
    )


def parse_options(text: str) -> Options:
    if not text.strip():
        return Options.model_validate({})
    try:
        return Options.model_validate_json(text, strict=False)
    except ValidationError as error:
        raise of_validation(
            [{"loc": ("options", *item["loc"]), "msg": item["msg"]} for item in error.errors()]
        ) from error


def named(files: list[File]) -> dict[str, Ref]:
    """Names inside the view set: masks and depth keep theirs where these tell the view, else they get their view's,
    by order.

    Raises ProblemError 422 unless there is an archive, or at least one view, and not both.
    """
    by_field: dict[str, list[File]] = {}
    for file in files:
        by_field.setdefault(file.field, []).append(file)
    result: dict[str, Ref] = {}
    for name, target in SINGLES.items():
        found = by_field.get(name, [])
        if len(found) > 1:
            raise ProblemError(422, "invalid_request", f"There must be one {name} file, not {len(found)}.")
        if found:
            result[target] = found[0].ref
    views = by_field.get("views", [])
    if "archive.zip" in result:
        if len(files) > 1:
            raise ProblemError(422, "invalid_request", "Send either an archive or single files, not both.")
        return result
    if not 1 <= len(views) <= 64:
        raise ProblemError(
            422,
            "invalid_request",
            f"1 to 64 views are needed, got {len(views)}.",
            hint="Send each picture as a field `views`, or a zip as `archive`.",
        )
    names = _view_names(views)
    result.update({f"views/{name}": view.ref for name, view in zip(names, views, strict=True)})
    for field in ("masks", "depth"):
        found = by_field.get(field, [])
        if len(found) > len(views):
            raise ProblemError(422, "invalid_request", f"There are {len(found)} {field} for {len(views)} views.")
        own = _own_names(found)
        if not paired(names, own)[0]:
            own = [name + _suffix(file.filename) for name, file in zip(names, found, strict=False)]
        result.update({f"{field}/{name}": file.ref for name, file in zip(own, found, strict=True)})
    return result


def _view_names(views: list[File]) -> list[str]:
    """The files' own names where these differ, else by order."""
    return _own_names(views) or [f"view_{i:02d}{_suffix(view.filename)}" for i, view in enumerate(views)]


def _own_names(views: list[File]) -> list[str]:
    """The files' own names, made plain, where these differ (a camera file may name them); else none."""
    own = [SAFE.sub("_", Path(view.filename.replace("\\", "/")).name).lstrip(".")[-100:] for view in views]
    own = [name if Path(name).suffix else name and f"{name}.png" for name in own]
    if all(own) and len({name.lower() for name in own}) == len(views):
        return own
    return []


def _suffix(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ".png"
