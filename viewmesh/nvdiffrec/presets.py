"""What each preset does, with the numbers visible. No numbers hide in the optimiser.

`preview` answers in minutes on a laptop; `standard` and `high` are meant for a GPU and are merely patient without one.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from viewmesh.options import Options, PresetName
from viewmesh.views.viewset import ViewSet


@dataclass(frozen=True)
class Preset:
    """Every number of one fit. Lengths are in cells of the lattice or in scene units as said; sizes in pixels."""

    name: PresetName
    surface: Literal["dmtet", "flexicubes"]
    lattice: int  # cells along the longest side of the object's box
    shape_steps: int
    shape_size: int  # side of the square crops of the shape pass
    shape_batch: int
    volume: tuple[int, ...]  # sides of the material volumes of the shape pass
    light_size: int  # side of a face of the environment cube map
    texture_steps: int
    texture_crop: int  # side of the square crops of the texture pass
    texture_batch: int
    target_faces: int
    texture_size: int  # side of the texture, pixels
    unwrap_timeout_s: float = 120.0
    normal_map: Literal["flat", "baked", "optimised"] = "baked"  # from the shape pass's surface, and optimised further
    # learning rates: Adam, falling exponentially to `final_rate` of themselves
    lr_sdf: float = 0.05  # cells
    lr_deform: float = 0.02
    lr_volume: float = 0.05
    lr_light: float = 0.02
    lr_vertices: float = 1e-4  # scene units
    lr_texture: float = 0.02
    lr_normal_map: float = 0.01
    lr_exposure: float = 2e-3
    lr_pose: float = 5e-4  # radians, scene units
    final_rate: float = 0.1
    # weights of the losses
    mask: float = 1.0
    depth: float = 2.0
    sdf_sign: tuple[float, float] = (0.02, 0.002)  # first, last: cross-entropy of crossing edges (DMTet, eq. 2)
    sdf_smooth: tuple[float, float] = (0.02, 0.005)  # first, last: squared Laplacian of the field near the surface
    normal_smooth: float = 0.0
    flexi_developable: float = 0.25
    flexi_weights: float = 0.02
    material_smooth: float = 0.01
    light_white: float = 0.005
    laplacian: float = 20.0  # relative umbrella Laplacian of vertex offsets, in units of the mean edge squared
    refine_exposure: bool = False
    refine_pose: bool = False


_CPU = {
    "preview": Preset(
        name="preview", surface="dmtet", lattice=40, shape_steps=400, shape_size=224, shape_batch=2, volume=(16, 64),
        light_size=16, texture_steps=250, texture_crop=320, texture_batch=1, target_faces=12_000, texture_size=1024,
    ),
    "standard": Preset(
        name="standard", surface="dmtet", lattice=56, shape_steps=1000, shape_size=320, shape_batch=2, volume=(24, 96),
        light_size=16, texture_steps=800, texture_crop=512, texture_batch=1, target_faces=20_000, texture_size=2048,
    ),
    "high": Preset(
        name="high", surface="dmtet", lattice=80, shape_steps=2000, shape_size=448, shape_batch=2, volume=(32, 128),
        light_size=16, texture_steps=2000, texture_crop=768, texture_batch=1, target_faces=50_000, texture_size=2048,
        unwrap_timeout_s=300,
    ),
}  # fmt: skip
_GPU = {
    "preview": Preset(
        name="preview", surface="flexicubes", lattice=64, shape_steps=500, shape_size=320, shape_batch=6,
        volume=(32, 128), light_size=32, texture_steps=400, texture_crop=512, texture_batch=4, target_faces=20_000,
        texture_size=1024,
    ),
    "standard": Preset(
        name="standard", surface="flexicubes", lattice=96, shape_steps=1000, shape_size=448, shape_batch=8,
        volume=(32, 128, 256), light_size=32, texture_steps=1200, texture_crop=768, texture_batch=8,
        target_faces=50_000, texture_size=2048, normal_map="optimised",
    ),
    "high": Preset(
        name="high", surface="flexicubes", lattice=128, shape_steps=4000, shape_size=640, shape_batch=8,
        volume=(32, 128, 256), light_size=64, texture_steps=4000, texture_crop=1024, texture_batch=8,
        target_faces=100_000, texture_size=4096, unwrap_timeout_s=300, normal_map="optimised",
    ),
}  # fmt: skip


def preset(
    name: PresetName,
    device: torch.device | str,
    *,
    target_faces: int | None = None,
    texture_size: int | None = None,
    refine_cameras: bool = False,
) -> Preset:
    """The preset `name` in the size that suits `device`, with the caller's face count and texture size where given.

    refine_cameras: also optimise a small pose and exposure correction of each view, for cameras that were estimated.
    """
    chosen = (_CPU if torch.device(device).type == "cpu" else _GPU)[name]
    return replace(
        chosen,
        target_faces=target_faces or chosen.target_faces,
        texture_size=texture_size or chosen.texture_size,
        refine_exposure=refine_cameras,
        refine_pose=refine_cameras,
    )


def preset_for(options: Options, views: ViewSet, device: torch.device | str) -> Preset:
    """The preset that the options ask for; poses that were estimated may be corrected a little."""
    return preset(
        options.preset, device, target_faces=options.target_faces, texture_size=options.texture_size,
        refine_cameras=views.camera_source in ("sfm", "vggt"),
    )  # fmt: skip
