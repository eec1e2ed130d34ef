"""report.json: what was made, how good it is, how long it took. The pydantic models are its schema."""

import statistics
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from viewmesh import __version__
from viewmesh.export.metrics import mask_iou, on_white, psnr, ssim, view_on_white
from viewmesh.export.result import Reconstruction, to_cpu
from viewmesh.geometry.clean import components, is_watertight
from viewmesh.geometry.mesh import TexturedMesh
from viewmesh.geometry.texels import texels_inside
from viewmesh.render.draw import draw
from viewmesh.views.viewset import ViewSet

MEASURED_VIEWS = 12


class ViewQuality(BaseModel):
    """Against the input views that were drawn again, means over them; whole images, sRGB values, on white."""

    model_config = ConfigDict(extra="forbid")

    views: int = Field(description="How many of the input views were measured, evenly picked.")
    psnr_db: float
    ssim: float
    mask_iou: float | None = Field(description="Null where the views have no masks.")


class MatchFigures(BaseModel):
    """Against the input views, over crops around the object."""

    model_config = ConfigDict(extra="forbid")

    psnr_db: float
    mask_iou: float


class Refinement(BaseModel):
    """What came of `refine`: where the generated mesh lay among the views, and how well it matched them."""

    model_config = ConfigDict(extra="forbid")

    kept: bool = Field(description="Whether the files hold the refined mesh; else the generated one.")
    reason: str = Field("", description="Why it was not refined, or not kept.")
    registration: dict[str, Any] | None = Field(
        None,
        description="scene_from_mesh (4x4, from the generated mesh to the working frame), scale, silhouette_iou, "
        "color_correlation and depth_error (scene units).",
    )
    cameras: str | None = Field(None, description="Whose they are: file, canonical6, vggt or sfm; null without any.")
    before: MatchFigures | None = None
    after: MatchFigures | None = None


class Report(BaseModel):
    """The file report.json."""

    model_config = ConfigDict(extra="forbid")

    version: str = Field(description="Of viewmesh.")
    model: str
    chosen_because: str = Field("", description="Why this model ran; empty where the caller named it.")
    preset: str
    seed: int
    device: str
    weights_revision: str
    licence_notes: list[str]
    warnings: list[str]
    world_from_mesh: list[list[float]] = Field(
        description="4x4, row-major: from the files' frame (+y up) to the world that the input's cameras are in."
    )
    faces: int
    vertices: int
    components: int
    watertight: bool
    bounds: list[list[float]] = Field(description="Lower and upper corner, in the files' frame.")
    texture_size: int
    uv_coverage: float = Field(description="Share of the texture's texels that lie inside a chart.")
    input_views: int
    quality: ViewQuality | None = Field(description="Null where there are no posed views to compare with.")
    refinement: Refinement | None = Field(None, description="Null where `refine` was not asked for.")
    generated_together: int = Field(1, description="Jobs that shared the generative model's passes, this one included.")
    seconds: dict[str, float] = Field(description="Per stage, in the order they ran.")
    files: list[str]


def report_of(result: Reconstruction, output: TexturedMesh, files: list[str]) -> Report:
    """The report of a result; output is its mesh in the files' frame."""
    mesh = output.mesh
    size = output.material.base_color.shape[0]
    return Report(
        version=__version__,
        model=result.model,
        chosen_because=result.chosen_because,
        preset=result.preset,
        seed=result.seed,
        device=result.device,
        weights_revision=result.weights_revision,
        licence_notes=list(result.licence_notes),
        warnings=list(result.warnings),
        world_from_mesh=result.world_from_mesh.tolist(),
        faces=len(mesh.faces),
        vertices=len(mesh.vertices),
        components=int(components(mesh).max()) + 1,
        watertight=is_watertight(mesh),
        bounds=[mesh.vertices.amin(0).tolist(), mesh.vertices.amax(0).tolist()],
        texture_size=size,
        uv_coverage=_coverage(output, size),
        input_views=0 if result.views is None else len(result.views),
        quality=None if result.views is None else measure(result.mesh, result.views),
        refinement=None if result.refinement is None else Refinement.model_validate(result.refinement),
        generated_together=result.generated_together,
        seconds={name: round(s, 3) for name, s in result.seconds.items()},
        files=files,
    )


def measure(mesh: TexturedMesh, views: ViewSet, limit: int = MEASURED_VIEWS) -> ViewQuality | None:
    """mesh, in the frame of the views' cameras and under its own environment, against at most `limit` of the views;
    where those have no pixel, it counts as right."""
    if views.cameras is None or len(views) == 0:
        return None
    n = min(limit, len(views))
    some = views.select(torch.linspace(0, len(views) - 1, n).round().long().tolist())
    assert some.cameras is not None
    drawn = draw(to_cpu(mesh), some.cameras, mesh.environment, supersample=1).cpu()
    images, targets = on_white(drawn), view_on_white(some.images)
    if some.known is not None:
        images = torch.where(some.known[..., None], images, targets)
        drawn = drawn * some.known[..., None]
    masked = views.mask_source != "none"
    ious = [mask_iou(d[..., 3], v[..., 3].float() / 255) for d, v in zip(drawn, some.images, strict=True)]
    return ViewQuality(
        views=n,
        psnr_db=statistics.fmean(psnr(a, b) for a, b in zip(images, targets, strict=True)),
        ssim=statistics.fmean(ssim(a, b) for a, b in zip(images, targets, strict=True)),
        mask_iou=statistics.fmean(ious) if masked else None,
    )


def _coverage(output: TexturedMesh, size: int) -> float:
    _, x, y, _ = texels_inside(output.uvs.double()[output.uv_faces] * size)
    return float(len(torch.unique(y * size + x)) / size**2)
