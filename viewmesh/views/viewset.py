"""ViewSet: what every model is given. A frozen value, already checked, in memory, on the CPU."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from viewmesh.geometry.camera import Cameras, similarity_scale

CameraSource = Literal["file", "canonical6", "sfm", "vggt"]
MaskSource = Literal["masks", "alpha", "rembg", "grabcut", "none"]


@dataclass(frozen=True)
class ViewSet:
    """N views of one object.

    names: the files' names as the user knows them, e.g. "views/view_00.png".
    images: (N, H, W, 4) uint8 sRGB, straight alpha; the alpha channel is the object's coverage (without masks 255
        wherever the photo has a pixel). Views of other sizes have been scaled and padded to one size, their
        intrinsics with them.
    cameras: in the frame "scene"; None when the views are not posed (generative models need no cameras).
    known: (N, H, W) bool, False where a view has no pixel and so says nothing of what is there: beside a smaller photo,
        or where its lens saw nothing; None where all is known.
    depths: (N, H, W) float32 z-depth in scene units, 0 = unknown; None if the view set has no depth.
    world_from_scene: (4, 4) float64 similarity. The scene frame is where the work is done: the object lies within
        [-0.5, 0.5]^3 and +y is up; the world frame is the one the input's cameras are in.
    """

    names: tuple[str, ...]
    images: Tensor  # (N, H, W, 4)
    cameras: Cameras | None
    depths: Tensor | None = None  # (N, H, W)
    known: Tensor | None = None  # (N, H, W)
    world_from_scene: Tensor = field(default_factory=lambda: torch.eye(4, dtype=torch.float64))
    camera_source: CameraSource | None = None
    mask_source: MaskSource = "none"
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def height(self) -> int:
        return self.images.shape[1]

    @property
    def width(self) -> int:
        return self.images.shape[2]

    def select(self, index: list[int]) -> "ViewSet":
        """The views of the given indices, in that order."""
        return replace(
            self,
            names=tuple(self.names[i] for i in index),
            images=self.images[index],
            cameras=None if self.cameras is None else self.cameras[index],
            depths=None if self.depths is None else self.depths[index],
            known=None if self.known is None else self.known[index],
        )

    def moved(self, target_from_scene: Tensor) -> "ViewSet":
        """The same views with the scene frame moved by a (4, 4) similarity; depths scale with it."""
        m = target_from_scene.to(torch.float64)
        return replace(
            self,
            cameras=None if self.cameras is None else self.cameras.moved(m),
            depths=None if self.depths is None else self.depths * similarity_scale(m).float(),
            world_from_scene=self.world_from_scene @ torch.linalg.inv(m),
        )
