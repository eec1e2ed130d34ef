"""What the HTTP API speaks: the pydantic models of requests and answers, as /openapi.json shows them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from viewmesh.options import Format

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ACTIVE = ("queued", "running")
TERMINAL = ("succeeded", "failed", "cancelled")

MEDIA_TYPES = {
    ".glb": "model/gltf-binary",
    ".obj": "model/obj",
    ".mtl": "model/mtl",
    ".ply": "model/ply",
    ".stl": "model/stl",
    ".usdz": "model/vnd.usdz+zip",
    ".hdr": "image/vnd.radiance",
    ".png": "image/png",
    ".mp4": "video/mp4",
    ".json": "application/json",
}


def media_type(name: str) -> str:
    return MEDIA_TYPES.get(name[name.rfind(".") :], "application/octet-stream")


class ErrorView(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    hint: str = ""
    details: dict[str, Any] = {}


class ArtifactView(BaseModel):
    name: str
    url: str
    bytes: int
    sha256: str
    media_type: str


class ReconstructionView(BaseModel):
    """A reconstruction, or an export of one (`parent` is then set)."""

    id: str
    kind: Literal["reconstruction", "export"]
    parent: str | None = None
    state: State
    model: str
    chosen_because: str = Field("", description="Why this model, where the caller left it to `auto`.")
    stage: str | None = Field(None, description="prepare, optimise, generate, refine, finish or export.")
    step: int = 0
    steps: int = 0
    percent: float = Field(0, ge=0, le=100)
    eta_s: float | None = Field(None, description="Seconds until the end, as far as known.")
    queue_position: int | None = Field(None, description="Jobs that will be started before this one.")
    created_at: str
    started_at: str | None = None
    finished_at: str | None = None
    expires_at: str | None = Field(None, description="When its data will be deleted; not before its exports'.")
    options: dict[str, Any]
    artifacts: list[ArtifactView] = []
    report: dict[str, Any] | None = None
    error: ErrorView | None = None
    resumes: int = Field(0, description="How often work went on from a checkpoint after a worker was lost.")
    links: dict[str, str] = {}


class ReconstructionList(BaseModel):
    items: list[ReconstructionView]
    next: str | None = Field(None, description="The cursor of the next page.")


class ModelView(BaseModel):
    name: str
    ready: bool
    reason: str = Field("", description="Why it is not ready.")
    hint: str = Field("", description="The command that makes it ready.")
    description: str
    licence: str
    vram_bytes: int = Field(description="GPU memory it wants; 0: runs on a CPU as well.")
    options: dict[str, Any] = Field(description="JSON schema of the options.")


class ModelList(BaseModel):
    models: list[ModelView]
    default: str | None


class ExportRequest(BaseModel):
    """Another format, face count or texture size of a finished reconstruction."""

    model_config = ConfigDict(extra="forbid")

    formats: list[Format] = Field(["glb"], min_length=1)
    target_faces: int | None = Field(None, ge=100, le=1_000_000)
    texture_size: Literal[256, 512, 1024, 2048, 4096] | None = None
    webhook_url: str | None = Field(None, max_length=2048)


class Problem(BaseModel):
    """RFC 9457 problem details."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    hint: str = ""
    request_id: str = ""
    errors: list[dict[str, Any]] = []


class Health(BaseModel):
    status: Literal["ok", "unavailable"]
    checks: dict[str, str] = {}
