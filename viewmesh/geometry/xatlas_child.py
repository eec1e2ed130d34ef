"""`python -m viewmesh.geometry.xatlas_child IN.npz OUT.npz`: one mesh through xatlas. The only importer of xatlas.

It runs in a process of its own because xatlas can crash the one that it runs in. It imports no torch, so it starts in a
fraction of a second. IN holds `vertices` (V, 3) float32 and `faces` (F, 3) uint32; OUT holds `points` (T, 2) float32 in
the mesh's own length unit, `faces` (F, 3) into them, and `vertex` (T,), the mesh vertex of each point.
"""

import sys

import numpy as np

SCALE = np.float32(1000)  # xatlas leaves out faces of an area below 1e-7, which fine meshes of unit size have


def main(source: str, target: str) -> None:
    import xatlas

    mesh = np.load(source)
    atlas = xatlas.Atlas()
    atlas.add_mesh(mesh["vertices"] * SCALE, mesh["faces"])
    chart, pack = xatlas.ChartOptions(), xatlas.PackOptions()
    pack.resolution, pack.rotate_charts = 1024, False  # its packing is thrown away: ours puts all parts together
    atlas.generate(chart, pack)
    vertex, faces, uvs = atlas.get_mesh(0)
    points = uvs * np.array([atlas.width, atlas.height], np.float32) / max(atlas.texels_per_unit * SCALE, 1e-30)
    np.savez(target, points=points, faces=faces, vertex=vertex)


if __name__ == "__main__":
    main(*sys.argv[1:])
