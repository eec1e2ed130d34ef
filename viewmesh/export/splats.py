"""gaussians.ply: the layout that viewers of 3D Gaussian Splatting read (Kerbl et al. 2023)."""

import numpy as np
import torch

from viewmesh.geometry.gaussians import Gaussians

SH_DC = 0.28209479177387814  # the constant spherical harmonic
PROPERTIES = (
    *("x", "y", "z", "nx", "ny", "nz"),
    *("f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)


def gaussian_ply_bytes(gaussians: Gaussians) -> bytes:
    """Binary little-endian PLY: centres, no normals, colours as coefficients of the constant harmonic, logit
    opacities, log scales, rotations with w first."""
    g = Gaussians(**gaussians.tensors())
    columns = [
        g.centers,
        torch.zeros_like(g.centers),
        (g.colors - 0.5) / SH_DC,
        torch.logit(g.opacities, eps=1e-6)[:, None],
        g.scales.clamp(min=1e-12).log(),
        torch.nn.functional.normalize(g.rotations, dim=-1),
    ]
    rows = torch.cat(columns, -1).numpy().astype("<f4")
    header = ["ply", "format binary_little_endian 1.0", "comment viewmesh, +y up", f"element vertex {len(rows)}"]
    header += [f"property float {name}" for name in PROPERTIES] + ["end_header"]
    return ("\n".join(header) + "\n").encode() + np.ascontiguousarray(rows).tobytes()
