"""Quadric edge collapse (Garland and Heckbert 1997). The only importer of fast_simplification.

`python -m viewmesh.geometry.collapse IN.npz OUT.npz TARGET` does it in a process of its own, on `vertices` and `faces`.
"""

import os
import sys

import numpy as np


def collapse(vertices: np.ndarray, faces: np.ndarray, target_faces: int) -> tuple[np.ndarray, np.ndarray]:
    """vertices (V, 3) float64, faces (F, 3) int32, and both again with at most about target_faces. One thread at a
    time: the library keeps its mesh in global variables, and holds the interpreter's lock while it works."""
    import fast_simplification

    return fast_simplification.simplify(vertices, faces, target_count=target_faces)[:2]


if __name__ == "__main__":
    mesh = np.load(sys.argv[1])
    vertices, faces = collapse(mesh["vertices"], mesh["faces"], int(sys.argv[3]))
    np.savez(f"{sys.argv[2]}.part.npz", vertices=vertices, faces=faces)
    os.replace(f"{sys.argv[2]}.part.npz", sys.argv[2])  # a file with its name is whole
