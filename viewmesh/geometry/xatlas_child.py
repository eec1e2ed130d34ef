"""`python -m viewmesh.geometry.xatlas_child FOLDER AT_ONCE`: meshes through xatlas. The only importer of xatlas.

It runs in a process of its own because xatlas can crash the one that it runs in, and forks AT_ONCE workers, each of
which takes the next mesh until there is none; for one that crashed another goes on, so that a mesh can only take itself
along, and Python starts once. It imports no torch, so that this takes a fraction of a second.

FOLDER/NAME.in.npz holds `vertices` (V, 3) float32 and `faces` (F, 3) uint32; NAME.out.npz then holds `points` (T, 2)
float32 in the mesh's own length unit, `faces` (F, 3) into them, and `vertex` (T,), the mesh vertex of each point. There
is none where xatlas failed.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from viewmesh import cpus

SCALE = np.float32(1000)  # xatlas leaves out faces of an area below 1e-7, which fine meshes of unit size have


def main(folder: Path, at_once: int) -> None:
    import xatlas  # noqa: F401 - once, for all that are forked

    sources = sorted(folder.glob("*.in.npz"))
    workers = min(at_once, len(sources))
    for _ in range(workers):
        worker(sources)
    while workers:
        _, status = os.wait()
        if status == 0:
            workers -= 1
        else:
            worker(sources)  # what the last one was at is taken: it ends, too


def worker(sources: Sequence[Path]) -> None:
    """Forks it."""
    if os.fork():
        return
    status = 1
    try:
        for source in sources:
            with contextlib.suppress(FileExistsError):
                source.with_suffix(".taken").open("x").close()
                charted(source, source.with_name(source.name.replace(".in.", ".out.")))
        status = 0
    finally:
        os._exit(status)


def charted(source: Path, target: Path) -> None:
    import xatlas

    mesh = np.load(source)
    with cpus.on_one():
        atlas = xatlas.Atlas()  # starts a thread per CPU that it may use: 63 of them take longer than the charts do
    atlas.add_mesh(mesh["vertices"] * SCALE, mesh["faces"])
    chart, pack = xatlas.ChartOptions(), xatlas.PackOptions()
    # Its packing is thrown away: ours puts all parts together. But it makes charts whole texels wide, so not too few.
    pack.resolution, pack.rotate_charts = 256, False
    atlas.generate(chart, pack)
    vertex, faces, uvs = atlas.get_mesh(0)
    points = uvs * np.array([atlas.width, atlas.height], np.float32) / max(atlas.texels_per_unit * SCALE, 1e-30)
    unfinished = target.with_name(f"unfinished-{target.name}")
    np.savez(unfinished, points=points, faces=faces, vertex=vertex)
    unfinished.replace(target)  # a file with its name is whole


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
