"""What the rasterisers are tried on, and how near their answers must be."""

import math

import torch
from torch import Tensor

from viewmesh.geometry.camera import look_at, pinhole

H, W = 12, 17  # of most images


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two images of 9 random triangles over 12 shared vertices, in front of the camera; one of them degenerate."""
    g = generator(seed)
    xyz = torch.rand(2, 12, 3, generator=g, dtype=torch.float64) * 2.4 - 1.2
    w = 0.5 + torch.rand(2, 12, 1, generator=g, dtype=torch.float64) * 2
    clip = torch.cat([xyz * w * torch.tensor([1, 1, 0.7]), w], -1)
    faces = torch.stack([torch.randperm(12, generator=g)[:3] for _ in range(9)])
    faces[4, 2] = faces[4, 1]
    return clip.float(), faces  # float32 values: every back-end sees exactly the same vertices


def tetrahedra(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two images of two closed tetrahedra, one before the other."""
    g = generator(seed)
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    faces = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    clips = []
    for _ in range(2):
        turn = torch.linalg.qr(torch.randn(3, 3, generator=g))[0]
        a, b = (
            corners @ turn * 0.5 + torch.tensor([0.2, 0.1, 3.0]),
            corners @ turn.T * 0.6 + torch.tensor([-0.3, 0, 4.5]),
        )
        p = torch.cat([a, b])
        clips.append(torch.stack([p[:, 0] * 2.5, p[:, 1] * 2.5, p[:, 2] - 2, p[:, 2]], -1))
    return torch.stack(clips), torch.cat([faces, faces + 4])


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    """Within a tolerance of the largest value: float32 against float64."""
    scale = max(float(expected.detach().abs().max()), 1e-6)
    error = float((actual.detach().cpu().double() - expected.detach()).abs().max()) / scale
    assert error < tolerance, f"relative error {error:.2e}"


def sphere(level: int = 3) -> tuple[Tensor, Tensor]:
    import trimesh

    mesh = trimesh.creation.icosphere(level)
    return torch.tensor(mesh.vertices, dtype=torch.float32), torch.tensor(mesh.faces)


def project(points: Tensor, eye: Tensor, size: int) -> Tensor:
    camera = pinhole(look_at(eye, torch.zeros(3), torch.tensor([0.0, 1, 0]))[None], math.radians(45), size, size)
    m = (camera.clip_from_camera(0.1, 10) @ camera.camera_from_world).to(points)
    return torch.cat([points, torch.ones_like(points[:, :1])], -1) @ m.mT


CUBE = torch.tensor([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
CUBE_TRIANGLES = torch.tensor(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
     [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
)  # fmt: skip
