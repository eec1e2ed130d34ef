"""What can be told: the `args` of serve_config.yaml (AppArgs), and the `user_config` of Router and Conductor.

Unknown keys are refused. Changing `args` restarts replicas, changing a `user_config` does not.
"""

import base64
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from viewmesh.weights.ready import GENERATIVE

ModelName = Literal["nvdiffrec", "trellis", "reconviagen"]
GIB = 2**30
MIB = 2**20


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)  # secrets are among it


class Limits(Strict):
    """What one request may send, and how long it may take to do so."""

    file_bytes: int = Field(default=64 * MIB, gt=0, description="One view, mask, depth map or camera file.")
    total_bytes: int = Field(default=1 * GIB, gt=0, description="One whole request.")
    files: int = Field(default=200, gt=0)
    field_bytes: int = Field(default=1 * MIB, gt=0, description="A text field such as `options`.")
    read_timeout_s: float = Field(default=20.0, gt=0, description="The longest silence while a body is read.")
    upload_timeout_s: float = Field(default=900.0, gt=0, description="The longest that a whole body may take.")
    requests: int = Field(default=150, gt=0, description="Requests at once per Router, event streams not counted.")
    streams: int = Field(default=2000, gt=0, description="Open event streams and waiting requests per Router.")
    wait_s: float = Field(default=120.0, ge=0, description="The longest `Prefer: wait` that is honoured.")


class RouterConfig(Strict):
    """The Router's user_config: applied without a restart."""

    limits: Limits = Limits()
    metrics: bool = Field(default=True, description="Serve /metrics.")
    docs: bool = Field(default=True, description="Serve /docs and /openapi.json.")
    poll_s: float = Field(default=0.2, gt=0, le=5, description="How often the job database is asked for new events.")
    heartbeat_s: float = Field(
        default=15.0, gt=0, description="Comment lines on event streams that have nothing to say."
    )


class ConductorConfig(Strict):
    """The Conductor's user_config: applied without a restart."""

    slots: dict[ModelName, Annotated[int, Field(ge=1)]] = Field(
        default={},
        description="Jobs of a model from their first stage to their last but one; others wait as `queued`. "
        "Default 4 of nvdiffrec, 18 of the others.",
    )

    def slots_of(self, model: str) -> int:
        usual = 18 if model in GENERATIVE else 4  # a generator's replica works on so many at once
        return {str(name): count for name, count in self.slots.items()}.get(model, usual)


def signing_key(secret: str) -> bytes:
    """The key of a webhook secret: `whsec_`, which may be left out, and base64. Raises ValueError."""
    text = secret.removeprefix("whsec_").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise ValueError("a webhook secret is whsec_ and base64") from error


def _is_secret(secret: str) -> str:
    signing_key(secret)
    return secret


WebhookSecret = Annotated[str, AfterValidator(_is_secret)]


class Auth(Strict):
    """Who may call. Without a keys file everybody on this machine may; a public address, and what pages of other sites
    ask for, are refused unless `open` says so."""

    keys_file: Path | None = Field(
        default=None, description="YAML written by `viewmesh config key`: owners and hashed keys."
    )
    open: bool = Field(
        default=False,
        description="Serve everybody without keys: on a public address, or behind a proxy with a public name.",
    )


class Outbound(Strict):
    """What the service may call: webhooks and, if switched on, image_urls."""

    image_urls: bool = False
    webhook_secret: WebhookSecret | None = Field(
        default=None, description="whsec_ and base64; an owner's own secret comes first."
    )
    private_addresses: bool = Field(
        default=False, description="Allow http and private addresses. For tests and closed networks."
    )
    timeout_s: float = Field(default=10.0, gt=0)


class Fake(Strict):
    """Engines that need no model: for tests, benchmarks and dry runs. Seconds per stage; see deployments/fakes.py."""

    prepare_s: float = 0.0
    optimise_s: float = 1.0
    finish_s: float = 0.0
    export_s: float = 0.0
    steps: int = 40
    warm_s: float = 0.0
    load_s: float = 0.0
    gpu_bytes: int = 0

    def stage(self) -> dict[str, Any]:
        return self.model_dump(exclude={"warm_s", "load_s", "gpu_bytes"})


class AppArgs(Strict):
    """The arguments of the application."""

    data: Path = Field(Path("data"), description="Where the default database and artifact store lie.")
    database: str | None = Field(
        default=None, description="sqlite:///… or postgresql://…; null: jobs.sqlite in `data`."
    )
    artifacts: str | None = Field(
        default=None, description="An fsspec URL, file:///… or s3://…; null: artifacts/ in `data`."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="What the models run on.")
    models: list[ModelName] | None = Field(
        default=None, description="What is served; null: nvdiffrec, and the generative models whose weights are here."
    )
    weights: dict[str, str] = Field(
        default={},
        description="Folders by weight set (trellis, reconviagen, vggt-object, dinov2: its file, too), if not the "
        "downloaded ones.",
    )
    max_active_jobs: int = Field(
        default=2000, gt=0, description="Queued and running jobs of one owner, unless its key says."
    )
    retention_s: float | None = Field(
        default=7 * 86400, gt=0, description="Jobs are deleted so long after their end; null: never."
    )
    auth: Auth = Auth()
    outbound: Outbound = Outbound()
    fake: Fake | None = None

    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.data.absolute()}/jobs.sqlite"

    def artifacts_url(self) -> str:
        return self.artifacts or f"file://{self.data.absolute()}/artifacts"
