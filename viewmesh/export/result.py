"""Reconstruction: what every model ends with and what the exporter starts from. And the frame that files are in."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from viewmesh.geometry.camera import similarity_scale
from viewmesh.geometry.gaussians import Gaussians
from viewmesh.geometry.mesh import TexturedMesh
from viewmesh.views.viewset import ViewSet


@dataclass(frozen=True)
class Reconstruction:
    """A finished mesh and all that is worth knowing about how it came about.

    mesh: in the frame "scene" (+y up, the object within the unit cube), with its environment.
    views: what it was made from, cameras in the scene frame; None where nothing is to be measured against them.
    world_from_scene: (4, 4) float64 similarity; the world is the frame of the input's cameras.
    gaussians: in the frame "scene", of a model that makes them and was asked to.
    chosen_because: why this model ran, if nobody named it. refinement: what came of `refine`, None if not asked for.
    previews: thumbnail.png and turntable.mp4 where they are drawn already, see `preview.early_previews`.
    generated_together: how many jobs shared its passes of a generative model, so that its seconds are theirs, too.
    seconds: per stage, in the order they ran. weights_revision: of a pretrained model, "" if there is none.
    """

    mesh: TexturedMesh
    views: ViewSet | None = None
    world_from_scene: Tensor = field(default_factory=lambda: torch.eye(4, dtype=torch.float64))
    model: str = "nvdiffrec"
    preset: str = "preview"
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    weights_revision: str = ""
    licence_notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    gaussians: Gaussians | None = None
    chosen_because: str = ""
    refinement: dict[str, Any] | None = None
    previews: dict[str, bytes] = field(default_factory=dict)
    generated_together: int = 1

    @property
    def world_from_mesh(self) -> Tensor:
        """(4, 4) float64: files are +y up and otherwise as the input's world is: a rotation about its origin, the
        identity when the input is +y up itself."""
        scale = similarity_scale(self.world_from_scene)
        turn = torch.eye(4, dtype=torch.float64)
        turn[:3, :3] = self.world_from_scene.double()[:3, :3] / scale
        return turn

    @property
    def mesh_from_scene(self) -> Tensor:
        """(4, 4) float64: a scale and a shift; the scene is +y up already, so directions (and the environment) stay."""
        return torch.linalg.inv(self.world_from_mesh) @ self.world_from_scene.double()

    @property
    def output(self) -> TexturedMesh:
        """The mesh in the frame that files are in, on the CPU."""
        mesh = to_cpu(self.mesh)
        return mesh.transformed(self.mesh_from_scene)

    @property
    def output_gaussians(self) -> Gaussians | None:
        """The Gaussians in the frame that files are in."""
        if self.gaussians is None:
            return None
        m = self.mesh_from_scene
        return self.gaussians.scaled(float(similarity_scale(m)), m[:3, 3])


def to_cpu(mesh: TexturedMesh) -> TexturedMesh:
    """The same textured mesh, detached, on the CPU, float32."""
    material = replace(
        mesh.material,
        **{k: getattr(mesh.material, k).detach().float().cpu() for k in ("base_color", "orm", "normal")},
    )
    environment = None if mesh.environment is None else mesh.environment.detach().float().cpu()
    geometry = replace(mesh.mesh.to("cpu"), vertices=mesh.mesh.vertices.detach().float().cpu())
    return TexturedMesh(geometry, mesh.uvs.detach().float().cpu(), mesh.uv_faces.cpu(), material, environment)
