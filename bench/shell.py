"""A shape for random weights: every network does its work, then a bumpy shell stands in for what it decoded.

`build` is the service's with such an engine (`import_path: bench.shell:build`), for bench/scale.py: jobs of the real
size, 12,008 active voxels and some 700,000 faces before they are simplified, without the published weights.
"""

import torch
from ray.serve import Application
from torch import Tensor

from bench.trellis import shell
from deployments.adapters.trellis import LibraryGenerator
from serve_app import app, models
from serve_app.settings import AppArgs
from viewmesh.geometry.dual_tables import CORNERS
from viewmesh.geometry.flexicubes import FlexiMesh
from viewmesh.trellis import stages
from viewmesh.trellis.sparse import SparseTensor, Voxels
from viewmesh.trellis.surface import CHANNELS, surface_mesh

RADIUS = 0.38
BUMPS = 0.004, 60.0  # height, radians per unit


def build(args: AppArgs) -> Application:
    models.GENERATOR = "bench.shell:ShellGenerator"
    return app.build(args)


class ShellGenerator(LibraryGenerator):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        stages.occupied, stages.decode_mesh = occupied, decode_mesh


decoded_voxels = stages.occupied


def occupied(networks: stages.Networks, latent: Tensor) -> Voxels:
    """The decoder's work is done and not used."""
    decoded_voxels(networks, latent)
    coords, _ = shell(64, 0.0125, latent.device)
    return Voxels(torch.cat([torch.zeros_like(coords[:, :1]), coords], 1).int(), 64, (len(coords),))


def decode_mesh(networks: stages.Networks, latents: SparseTensor) -> FlexiMesh:
    """The decoder's weights and offsets, about the bumpy sphere's distances, with colours that vary."""
    decoded = networks.mesh_decoder(latents)
    coords, resolution = decoded.voxels.coords[:, 1:], decoded.voxels.resolution
    points = (coords[:, None] + torch.tensor(CORNERS, device=coords.device)) / resolution - 0.5
    height, frequency = BUMPS
    feats = decoded.feats.float()
    feats[:, slice(*CHANNELS["sdf"])] = points.norm(dim=-1) - RADIUS + height * (frequency * points).sin().sum(-1)
    tones = (frequency * points @ points.new_tensor([[1.0, 0.3, 0.7], [0.2, 1.0, 0.5], [0.6, 0.4, 1.0]])).sin()
    feats[:, slice(*CHANNELS["color"])] += torch.cat([2 * tones, torch.zeros_like(tones)], -1).flatten(1)
    return surface_mesh(coords, feats, resolution)
