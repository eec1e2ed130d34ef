"""A Reconstruction on disk, so that other formats, face counts and texture sizes need no model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from viewmesh.errors import InputError, InvalidMesh
from viewmesh.export.images import Maps, dequantised, unpng
from viewmesh.export.result import Reconstruction, to_cpu
from viewmesh.geometry.gaussians import Gaussians
from viewmesh.geometry.mesh import Material, Mesh, TexturedMesh
from viewmesh.geometry.nearest import NearestSurface
from viewmesh.geometry.normals import vertex_normals, vertex_tangents
from viewmesh.geometry.simplify import simplify
from viewmesh.geometry.unwrap import unwrap
from viewmesh.progress import never
from viewmesh.render.bake import dilate, sample_at, texel_map
from viewmesh.render.tangent_space import from_tangent_space, into_tangent_space

FORMAT = "viewmesh-reconstruction-1"
FACTS = (
    *("model", "preset", "seed", "seconds", "device", "weights_revision", "licence_notes", "warnings"),
    *("chosen_because", "refinement", "generated_together"),
)


def reconstruction_bytes(result: Reconstruction, maps: Maps | None = None) -> bytes:
    """Geometry as it is, textures as the 8-bit PNGs that every format carries; the input views are not kept. maps: the
    material's, if they are there already."""
    mesh = to_cpu(result.mesh)
    maps = maps or Maps(mesh.material)
    tensors = {
        "vertices": mesh.mesh.vertices, "faces": mesh.mesh.faces, "uvs": mesh.uvs, "uv_faces": mesh.uv_faces,
        "world_from_scene": result.world_from_scene.double(),
        **{name: torch.from_numpy(np.frombuffer(maps.png(name), np.uint8).copy()) for name in maps.images},
    }  # fmt: skip
    if mesh.environment is not None:
        tensors["environment"] = mesh.environment
    if result.gaussians is not None:
        tensors |= {f"gaussians.{name}": tensor for name, tensor in result.gaussians.tensors().items()}
    facts = {name: getattr(result, name) for name in FACTS}
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}  # the format shares no memory
    return save(tensors, {"format": FORMAT, "facts": json.dumps(facts)})


def load_reconstruction(path: Path) -> Reconstruction:
    """The result whose `reconstruction_bytes` a file holds, without views. Raises InputError for anything else."""
    path = Path(path)
    try:
        data = path.read_bytes()
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if header["format"] != FORMAT:
            raise InputError(
                f"is stored as {header['format']}, this version reads {FORMAT}.",
                file=str(path),
                hint="Read it with the version of viewmesh that wrote it.",
            )
        facts = json.loads(header["facts"])
        maps = {name: unpng(tensors[name].numpy().tobytes()) for name in ("base_color", "orm", "normal")}
        mesh = TexturedMesh(
            Mesh(tensors["vertices"], tensors["faces"]), tensors["uvs"], tensors["uv_faces"], dequantised(maps),
            tensors.get("environment"),
        ).validate()  # fmt: skip
        for name in ("licence_notes", "warnings"):
            facts[name] = tuple(facts[name])
        splats = {k.removeprefix("gaussians."): t for k, t in tensors.items() if k.startswith("gaussians.")}
        gaussians = Gaussians(**splats) if splats else None
        world_from_scene = tensors["world_from_scene"]
        if world_from_scene.shape != (4, 4) or not bool(torch.isfinite(world_from_scene).all()):
            raise ValueError("world_from_scene must be a finite (4, 4) matrix")
        return Reconstruction(mesh=mesh, world_from_scene=world_from_scene, gaussians=gaussians, **facts)
    except InvalidMesh as error:
        raise InputError(f"holds no sound mesh. {error}", file=str(path), hint="Make it again.") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            "is not a stored reconstruction.", file=str(path), hint="Give a file that viewmesh wrote as *.safetensors."
        ) from error


def reexport(
    result: Reconstruction,
    *,
    target_faces: int | None = None,
    texture_size: int | None = None,
    cancelled: Callable[[], bool] = never,
) -> Reconstruction:
    """The result with at most about target_faces triangles and textures of texture_size, baked from the old surface.

    Each new texel takes the material at the nearest point of the old mesh. The normal map is derived anew: the old
    shading normal there, in the new surface's tangent frame, so that detail lost as triangles stays as shading.
    Raises Cancelled.
    """
    old = to_cpu(result.mesh)
    size = texture_size or old.material.base_color.shape[0]
    if (target_faces is None or target_faces >= len(old.mesh.faces)) and size == old.material.base_color.shape[0]:
        return result
    new = Mesh(old.mesh.vertices, old.mesh.faces)
    new = simplify(new, target_faces) if target_faces else new
    atlas = unwrap(new, size, cancelled=cancelled)
    texels = texel_map(atlas.uvs, atlas.uv_faces, size)
    valid = texels.valid
    points = sample_at(texels, new.vertices, new.faces)[valid]
    there, _ = NearestSurface(old.mesh).query(points)
    uv = there.of(old.uvs, old.uv_faces)
    base_color, orm, tangent_space = (
        _lookup(image, uv) for image in (old.material.base_color, old.material.orm, old.material.normal)
    )
    old_normals = vertex_normals(old.mesh.vertices, old.mesh.faces)
    old_tangents = vertex_tangents(old.mesh.vertices, old.mesh.faces, old_normals, old.uvs, old.uv_faces)
    shading = from_tangent_space(
        tangent_space, there.of(old_normals, old.mesh.faces), there.of(old_tangents, old.uv_faces)
    )
    normals = vertex_normals(new.vertices, new.faces)
    tangents = vertex_tangents(new.vertices, new.faces, normals, atlas.uvs, atlas.uv_faces)
    local = into_tangent_space(
        shading, sample_at(texels, normals, new.faces)[valid], sample_at(texels, tangents, atlas.uv_faces)[valid]
    )

    def image(values: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(size, size, 3)
        out[valid] = values.float()
        return dilate(out, valid)

    normal = torch.nn.functional.normalize(image(local), dim=-1)
    material = Material(image(base_color).clamp(0, 1), image(orm).clamp(0, 1), normal)
    mesh = TexturedMesh(new, atlas.uvs, atlas.uv_faces, material, old.environment).validate()
    return replace(result, mesh=mesh, previews={})


def _lookup(image: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    """(P, 3) bilinear."""
    grid = (uv * 2 - 1)[None, None].to(image)
    at = torch.nn.functional.grid_sample(image.permute(2, 0, 1)[None], grid, align_corners=False, padding_mode="border")
    return at[0, :, 0].T
