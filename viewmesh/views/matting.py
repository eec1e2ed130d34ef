"""Matting by rembg: the only importer of it. Its network is downloaded by rembg itself at first use."""

import numpy as np

from viewmesh.errors import MissingModel

INSTALL = "pip install 'viewmesh[matting]'"


def available() -> bool:
    import importlib.util

    return importlib.util.find_spec("rembg") is not None


def matted(images: list[np.ndarray]) -> list[np.ndarray]:
    """Coverage (H, W) uint8 of the salient object of each (H, W, 3) image. Raises MissingModel."""
    try:
        import rembg  # pyright: ignore[reportMissingImports]

        session = rembg.new_session()
        return [np.asarray(rembg.remove(image, session=session, only_mask=True)) for image in images]
    except ImportError:
        raise MissingModel("Matting needs the package rembg.", hint=INSTALL) from None
    except Exception as error:
        raise MissingModel(
            f"rembg could not load its network ({error}).", hint="Give masks/, or use mask: grabcut."
        ) from None
