"""How much memory a fit will take, checked before it starts, so that it fails with a sentence and not with a kill."""

import torch

from viewmesh.errors import OutOfMemory
from viewmesh.nvdiffrec.presets import Preset


def memory_needed(preset: Preset, views: int, height: int, width: int) -> int:
    """Bytes, an upper estimate measured against peaks of real fits: see bench/reconstruct.py."""
    volumes = 5 * sum(d**3 for d in preset.volume) * 4 * 4  # value, gradient, two moments; float32
    cells = preset.lattice**3
    lattice = cells * (2 * 4 * 4 * 4 + 2 * 7 * 2 * 8 + 12 * 10 * 8)  # variables, edges, tetrahedra of a full box
    textures = preset.texture_size**2 * 9 * 4 * 6
    crops = views * (preset.shape_size**2 + preset.texture_crop**2) * 8
    photos = views * height * width * 8
    pixels = max(preset.shape_batch * preset.shape_size**2, preset.texture_batch * preset.texture_crop**2)
    return 600 * 2**20 + volumes + lattice + textures + crops + photos + pixels * 600


def memory_free(device: torch.device) -> int:
    """Bytes that can still be taken on the device; on a CPU what the kernel calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**62  # a system that does not tell is not second-guessed


def check_memory(preset: Preset, views: int, height: int, width: int, device: torch.device) -> None:
    """Raises OutOfMemory with both figures when the fit would not fit."""
    needed, free = memory_needed(preset, views, height, width), memory_free(device)
    if needed > free:
        raise OutOfMemory(
            f"The {preset.name} preset",
            needed=needed,
            free=free,
            device=str(device),
            hint="Take a smaller preset, fewer views or a smaller texture_size, or free memory.",
        )
