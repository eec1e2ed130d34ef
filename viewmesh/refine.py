"""Refinement: a generated mesh is put among posed views and optimised against them; the better of the two is kept.

    views = with_cameras(model, views)              # if the views have none and the model can tell
    state = start(mesh, views, options, numbers)    # registers; then fit.advance to the end
    refined = finish(state, views)

Where those cameras do not place the mesh and nobody has looked for others (`look_again`), the same once more with the
views of `posed_by_sfm`. A mesh that cannot be refined is no error: it is handed out as it came, with a warning.

The one place where generative models and the optimiser meet, besides Mesh. `reconstruct` and the deployments run it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from viewmesh.errors import EmptyReconstruction, InputError, InvalidMesh, OutOfMemory
from viewmesh.geometry.camera import Cameras
from viewmesh.geometry.gaussians import Gaussians
from viewmesh.geometry.mesh import Mesh, TexturedMesh
from viewmesh.nvdiffrec import fit
from viewmesh.nvdiffrec.match import Match
from viewmesh.nvdiffrec.optim import zero_moments
from viewmesh.nvdiffrec.presets import Preset
from viewmesh.nvdiffrec.problem import Problem
from viewmesh.nvdiffrec.register import Plan, Registration, register
from viewmesh.options import Options
from viewmesh.progress import Progress, never, silent
from viewmesh.views.load import load_views, survey
from viewmesh.views.normalise import normalise
from viewmesh.views.viewset import ViewSet

if TYPE_CHECKING:
    from viewmesh.generate import Model

PLAN = Plan()
NO_VGGT_CAMERAS = "The cameras that VGGT sees do not agree with the views' masks."
SFM_INSTEAD = "The mesh has no place among the cameras that VGGT sees; those of structure from motion are used."


@dataclass(frozen=True)
class Refined:
    """views: with the cameras that the mesh agrees with, without any where it agrees with none. facts: report.json's
    `refinement`. look_again: structure from motion may find the cameras that it could not be placed among."""

    mesh: TexturedMesh
    views: ViewSet
    gaussians: Gaussians | None
    facts: dict[str, Any]
    warnings: tuple[str, ...] = ()
    look_again: bool = False


def read_views(source: Path, options: Options, **asked: Any) -> ViewSet:
    """The views as options.model needs them, with a warning of each option that it knows nothing of.

    A generative model can do without the cameras that refining would like: for it, failing to find them is a warning.
    ReconViaGen finds cameras itself where no file or rig gives them.
    """
    views = _read_views(source, options, **asked)
    return replace(views, warnings=(*options.ineffective(), *views.warnings))


def _read_views(source: Path, options: Options, **asked: Any) -> ViewSet:
    rules = options.view_rules
    if options.model in ("auto", "nvdiffrec") or not options.refine:
        return load_views(source, rules, **asked)
    without = rules.model_copy(update={"cameras": "none", "rig": None})
    found = survey(source, rules)[1]
    if options.model == "reconviagen" and rules.cameras == "auto" and found == "sfm":
        return load_views(source, without, **asked)
    try:
        return load_views(source, rules, **asked)
    except InputError as error:
        if found != "sfm":
            raise  # the caller's own cameras
        views = load_views(source, without, **asked)  # raises again where the views are at fault
        return replace(views, warnings=(*views.warnings, str(error)))


def with_cameras(model: "Model", views: ViewSet) -> ViewSet:
    """Views without cameras, with those that ReconViaGen's VGGT sees: the views that it looks at where they are too
    many. As they are, with a warning, where the masks and what it sees do not fit together."""
    from viewmesh.trellis.reconviagen import ReconViaGen

    if views.cameras is not None or not isinstance(model, ReconViaGen) or views.mask_source == "none":
        return views
    from viewmesh.generate import few_enough
    from viewmesh.trellis.view_cameras import in_views

    seen, _ = few_enough(views, model, model.defaults)
    try:
        cameras = in_views(model.cameras(seen.images), seen.images)
        return _posed(seen, cameras)
    except (InputError, torch.linalg.LinAlgError):
        return replace(views, warnings=(*views.warnings, NO_VGGT_CAMERAS))
    except (OutOfMemory, torch.OutOfMemoryError) as error:  # the mesh is there already
        why = str(error).splitlines()[0]
        return replace(views, warnings=(*views.warnings, f"VGGT could not look for the cameras. {why}"))


def posed_by_sfm(source: Path, options: Options, **asked: Any) -> ViewSet:
    """The views of a source with the cameras that structure from motion finds, in place of VGGT's.

    Raises InputError (PoseError mostly) where it finds none, or such as cannot be.
    """
    rules = options.views.model_copy(update={"cameras": "sfm", "rig": None})
    views = load_views(source, rules, **asked)
    return replace(views, warnings=(*options.ineffective(), *views.warnings, SFM_INSTEAD))


def unposed_because(error: InputError) -> str:
    """The warning where posed_by_sfm raised."""
    return f"Nor did structure from motion help: {error}"


def _posed(views: ViewSet, cameras: Cameras) -> ViewSet:
    """Views with cameras of any frame and scale, in the scene frame. Raises InputError, LinAlgError."""
    if not all(t.isfinite().all() for t in (cameras.world_from_camera, cameras.fx, cameras.fy)):
        raise InputError("The cameras are not finite.")
    found = normalise(cameras, views.images[..., 3].float() / 255, known=views.known)
    posed = replace(views, cameras=cameras, depths=None, camera_source="vggt")  # their scale is not the depth maps'
    return posed.moved(torch.linalg.inv(found.world_from_scene))


def start(
    mesh: Mesh | TexturedMesh,
    views: ViewSet,
    options: Options,
    numbers: Preset,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> fit.State:
    """Registers a mesh, in any frame, with posed views, and begins to fit it. Where it cannot be put among them the
    state is done at once and `finish` says so. Progress counts steps of the whole fit."""
    device = torch.device(device)
    total = numbers.shape_steps + len(fit.BETWEEN) + numbers.texture_steps
    generator = torch.Generator().manual_seed(options.seed)
    again: dict[str, Any] = {"look_again": True} if _sfm_may_help(views, options) else {}

    def given_up(reason: str, **notes: Any) -> fit.State:
        return _given_up(mesh, views, numbers, device, {**again, **notes, "reason": reason})

    def overall(stage: str, step: int, steps: int, **metrics: float) -> None:
        progress(stage, max(1, step * numbers.shape_steps // steps), total, **metrics)  # in the shape pass's place

    try:
        found = register(
            mesh, views, generator, device=device, plan=PLAN, progress=overall, cancelled=cancelled
        )  # fmt: skip
    except InputError as error:
        return given_up(f"The mesh was not refined. {error}")
    notes = {"registration": found.json()}
    if not found.good:
        share = round(100 * found.silhouette_iou)
        whose = " under VGGT's cameras" if views.camera_source == "vggt" else ""
        reason = f"The mesh was not refined: it agrees with no more than {share} % of the views' silhouettes{whose}."
        return given_up(reason, **notes)
    placed = mesh.transformed(found.scene_from_mesh)
    try:
        state = fit.start(views, numbers, generator, placed, device=device, cancelled=cancelled)
    except (InputError, InvalidMesh, EmptyReconstruction) as error:
        return given_up(f"The mesh was not refined. {error}", **notes)
    return replace(state, notes=notes)


def _sfm_may_help(views: ViewSet, options: Options) -> bool:
    """Whether nobody has looked for the views' cameras but VGGT, and what it saw is all that there is."""
    asked = options.model == "reconviagen" and options.views.cameras == "auto"
    return asked and views.camera_source in (None, "vggt") and views.mask_source != "none"


def _given_up(
    mesh: Mesh | TexturedMesh, views: ViewSet, numbers: Preset, device: torch.device, notes: dict[str, Any]
) -> fit.State:
    if isinstance(mesh, Mesh):
        raise InputError(notes["reason"])
    return fit.State(Problem(views, numbers, device), 0, "done", 0, {}, zero_moments({}), initial=mesh, notes=notes)


def finish(state: fit.State, views: ViewSet, gaussians: Gaussians | None = None) -> Refined:
    """What a state that `start` made and `fit.advance` brought to its end came to. gaussians: in the mesh's frame."""
    registration = state.notes.get("registration")
    if "reason" in state.notes:
        assert state.initial is not None
        reason = state.notes["reason"]
        facts = {"kept": False, "reason": reason, "cameras": views.camera_source, "registration": registration}
        again = state.notes.get("look_again", False)
        return Refined(state.initial, unposed(views), gaussians, facts, (reason,), again)
    result = fit.finish_compared(state)
    placed = Registration.from_json(state.notes["registration"])
    if gaussians is not None:
        m, scale = placed.scene_from_mesh, placed.scale
        gaussians = gaussians.rotated(m[:3, :3] / scale).scaled(scale, m[:3, 3])
    facts = {
        "kept": result.kept,
        "reason": "" if result.kept else "The refined mesh matched the views less well than the generated one.",
        "cameras": views.camera_source,
        "registration": registration,
        "before": _figures(result.before),
        "after": _figures(result.after),
    }
    return Refined(result.mesh, views, gaussians, facts)


def unposed(views: ViewSet) -> ViewSet:
    """The views without their cameras: a mesh that is not among them is not to be measured against them."""
    return replace(
        views, cameras=None, depths=None, camera_source=None, world_from_scene=torch.eye(4, dtype=torch.float64)
    )


def _figures(match: Match) -> dict[str, float]:
    return {"psnr_db": match.psnr, "mask_iou": match.iou}
