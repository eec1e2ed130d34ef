"""Colour of surface points under a prefiltered environment: split-sum GGX, ORM materials, tangent-space normals.

Works on flat lists of covered pixels (P, ...). The renderer of results and the optimiser both shade with this file.
"""

import torch
from torch import Tensor

from viewmesh.geometry.normals import unit
from viewmesh.render.brdf import environment_brdf
from viewmesh.render.light import Prefiltered
from viewmesh.render.rasterizer import Rasterizer

SRGB_KNEE = 0.0031308  # linear value below which the sRGB curve is a line
GRAZING = 0.1  # N.V below which a normal is bent towards the geometric one


def shade(
    points: Tensor,
    normals: Tensor,
    view_positions: Tensor,
    base_color: Tensor,
    orm: Tensor,
    light: Prefiltered,
    rasterizer: Rasterizer,
) -> Tensor:
    """Linear RGB radiance (P, 3) from points towards view_positions.

    points, normals (unit), base_color, orm: (P, 3); view_positions: (P, 3) or (3,), in the frame of the light.
    """
    return shade_directions(normals, unit(view_positions - points), base_color, orm, light, rasterizer)


def shade_directions(
    normals: Tensor, view_dirs: Tensor, base_color: Tensor, orm: Tensor, light: Prefiltered, rasterizer: Rasterizer
) -> Tensor:
    """`shade` with unit directions from the points towards the viewer.

    orm: occlusion (1 = unoccluded, multiplies the result), roughness, metallic, as in glTF.
    """
    occlusion, roughness, metallic = orm.split(1, -1)
    n_dot_v = (normals * view_dirs).sum(-1, keepdim=True)
    reflected = 2 * n_dot_v * normals - view_dirs
    diffuse = base_color * (1 - metallic)
    specular = 0.04 * (1 - metallic) + base_color * metallic
    scale, bias = environment_brdf(n_dot_v.squeeze(-1).clamp_min(0), roughness.squeeze(-1), rasterizer).split(1, -1)
    irradiance = rasterizer.texture(light.diffuse, normals, boundary="cube")
    radiance = rasterizer.texture(
        light.specular[0],
        reflected,
        boundary="cube",
        filter="trilinear",
        mips=light.specular[1:],
        level=light.level(roughness.squeeze(-1)),
    )
    return (irradiance * diffuse + radiance * (specular * scale + bias)) * occlusion


def perturb_normal(geometry_normal: Tensor, tangent: Tensor, tangent_space_normal: Tensor, view_dir: Tensor) -> Tensor:
    """Unit shading normals (P, 3), on the viewer's side of the surface.

    geometry_normal: (P, 3) interpolated vertex normals. tangent: (P, 4) interpolated `vertex_tangents`.
    tangent_space_normal: (P, 3), +y to the texture's top, as glTF. view_dir: (P, 3) unit, towards the viewer.
    """
    n = unit(geometry_normal)
    t = unit(tangent[:, :3] - n * (n * tangent[:, :3]).sum(-1, keepdim=True))
    b = torch.linalg.cross(n, t) * torch.where(tangent[:, 3:] < 0, -1.0, 1.0)
    x, y, z = tangent_space_normal.split(1, -1)
    return face_viewer(unit(t * x + b * y + n * z), n, view_dir)


def face_viewer(normal: Tensor, geometry_normal: Tensor, view_dir: Tensor) -> Tensor:
    """Unit normals flipped to the side that the viewer is on, and bent to the geometric one at grazing angles.

    Two-sided: where the unit geometric normal (P, 3) looks away from the viewer, both are turned around. Where the
    shading normal then has N.V < 0.1, it is blended with the geometric normal so that it never looks away.
    """
    side = torch.where((geometry_normal * view_dir).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    normal, geometry_normal = normal * side, geometry_normal * side
    keep = ((normal * view_dir).sum(-1, keepdim=True) / GRAZING).clamp(0, 1)
    return unit(torch.lerp(geometry_normal, normal, keep))


def srgb_to_linear(srgb: Tensor) -> Tensor:
    """IEC 61966-2-1, piecewise; finite gradients everywhere, linear below the knee (also below 0)."""
    curve = ((srgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(srgb <= 0.04045, srgb / 12.92, curve)


def linear_to_srgb(linear: Tensor) -> Tensor:
    """The inverse of srgb_to_linear; not clamped above 1."""
    curve = 1.055 * linear.clamp_min(SRGB_KNEE) ** (1 / 2.4) - 0.055
    return torch.where(linear <= SRGB_KNEE, linear * 12.92, curve)
