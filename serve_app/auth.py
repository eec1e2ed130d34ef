"""API keys: who calls, what they may use. Keys are random, kept as SHA-256, compared in constant time."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from serve_app.settings import Auth, WebhookSecret
from viewmesh.errors import OptionError

PREFIX = "vm_"
ANYBODY = "anonymous"


class Key(BaseModel):
    """One entry of the keys file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    owner: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Keys of one owner see the same jobs.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    max_active_jobs: int | None = Field(None, gt=0)
    upload_bytes_per_day: int | None = Field(None, gt=0)
    webhook_secret: WebhookSecret | None = None


KEYS = TypeAdapter(tuple[Key, ...], config=ConfigDict(hide_input_in_errors=True))


@dataclass(frozen=True)
class Caller:
    owner: str
    max_active_jobs: int | None = None
    upload_bytes_per_day: int | None = None


class KeyRing:
    """The keys file, read again when it changes. Without a file everybody is `anonymous`."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._stamp = 0.0
        self._keys: tuple[Key, ...] = ()
        if file is not None:
            self._read()

    @property
    def open(self) -> bool:
        return self.file is None

    def _read(self) -> tuple[Key, ...]:
        assert self.file is not None
        try:
            stamp = self.file.stat().st_mtime
            if stamp != self._stamp:
                self._keys = KEYS.validate_python(yaml.safe_load(self.file.read_text()) or [])
                self._stamp = stamp
        except (OSError, ValueError, yaml.YAMLError) as error:
            if not self._stamp:
                raise OptionError(f"{self.file}: not a keys file: {error}", hint="viewmesh config key OWNER") from error
        return self._keys  # a file that is being rewritten leaves the last good keys in force

    def caller(self, authorization: str | None, api_key: str | None) -> Caller | None:
        """Who calls, by `Authorization: Bearer` or `X-API-Key`; None for nobody that we know."""
        if self.file is None:
            return Caller(ANYBODY)
        scheme, _, token = (authorization or "").partition(" ")
        presented = token.strip() if scheme.lower() == "bearer" else (api_key or "")
        digest = hashlib.sha256(presented.encode()).hexdigest()
        found: Key | None = None
        for key in self._read():  # all of them, so that time does not tell how far a match was
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None or not presented:
            return None
        return Caller(found.owner, found.max_active_jobs, found.upload_bytes_per_day)

    def webhook_secret(self, owner: str) -> str | None:
        if self.file is None:
            return None
        return next((key.webhook_secret for key in self._read() if key.owner == owner and key.webhook_secret), None)


def new_key() -> tuple[str, str]:
    """A new key and what is kept of it."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, hashlib.sha256(key.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def refuse_to_be_open(auth: Auth, host: str | None) -> None:
    """Raises OptionError where a service on this address would answer anybody who can reach the machine. host: None
    where nothing listens."""
    if auth.keys_file is not None or auth.open or host is None or is_loopback(host):
        return
    raise OptionError(
        f"The service listens on {host} and has no API keys.",
        hint="Set auth.keys_file (viewmesh config key OWNER), listen on 127.0.0.1, or set auth.open: true.",
    )
