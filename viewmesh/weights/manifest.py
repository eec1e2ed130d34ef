"""What can be downloaded: which files of which repository, under which licence. Numbers only; no network, no disk.

`revision` pins a repository's commit in this file. Where it is None, the commit and every file's sha256 are taken from
the Hub at the first download, written to the lock file beside the weights, and demanded from then on.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFile:
    """path inside the repository; size in bytes and sha256 where they are known beforehand."""

    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class WeightSet:
    """One download. source: a Hugging Face repository, or an https address that `files[0]` is appended to.

    roles: the networks of its pipeline.json that are loaded, wherever that file says they lie.
    """

    name: str
    source: str
    revision: str | None
    files: tuple[WeightFile, ...]
    licence: str
    commercial: bool
    used_by: tuple[str, ...]
    roles: tuple[str, ...] = ()

    @property
    def is_repository(self) -> bool:
        return not self.source.startswith("https://")

    @property
    def known_bytes(self) -> int:
        return sum(file.size or 0 for file in self.files)


def _networks(*sizes: tuple[str, int | None]) -> tuple[WeightFile, ...]:
    files = [WeightFile("pipeline.json")]
    for name, size in sizes:
        files += [WeightFile(f"ckpts/{name}.json"), WeightFile(f"ckpts/{name}.safetensors", size)]
    return tuple(files)


NETWORK_ROLES = {  # our name: the role in pipeline.json, which names others, too
    "structure_flow": "sparse_structure_flow_model",
    "structure_decoder": "sparse_structure_decoder",
    "latent_flow": "slat_flow_model",
    "mesh_decoder": "slat_decoder_mesh",
    "gaussian_decoder": "slat_decoder_gs",
}
CONDITION_ROLES = ("sparse_structure_vggt_cond", "slat_vggt_cond")

TRELLIS = WeightSet(
    name="trellis",
    source="microsoft/TRELLIS-image-large",
    revision=None,
    files=_networks(
        ("ss_dec_conv3d_16l8_fp16", 147_591_972),
        ("ss_flow_img_dit_L_16l8_fp16", 1_130_770_840),
        ("slat_flow_img_dit_L_64l8p2_fp16", 1_203_755_136),
        ("slat_dec_mesh_swin8_B_64l8m256c_fp16", 181_903_412),
        ("slat_dec_gs_swin8_B_64l8gs32_fp16", 171_450_952),
    ),
    licence="MIT",
    commercial=True,
    used_by=("trellis",),
    roles=tuple(NETWORK_ROLES.values()),
)
DINOV2 = WeightSet(
    name="dinov2",
    source="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14",
    revision=None,
    files=(WeightFile("dinov2_vitl14_reg4_pretrain.pth", 1_217_607_321),),
    licence="Apache-2.0",
    commercial=True,
    used_by=("trellis", "reconviagen"),
)
RECONVIAGEN = WeightSet(
    name="reconviagen",
    source="Stable-X/trellis-vggt-v0-2",
    revision="647659a5ad5fbf67e22793e7b5e2cee4b30c5d13",
    files=_networks(
        ("ss_dec_conv3d_16l8_fp16", None),
        ("ss_flow_img_dit_L_16l8_fp16", None),
        ("slat_flow_img_dit_L_64l8p2_fp16", None),
        ("slat_dec_mesh_swin8_B_64l8m256c_fp16", None),
        ("slat_dec_gs_swin8_B_64l8gs32_fp16", None),
        ("ss_vggt_cond", None),
        ("slat_vggt_cond", None),
    ),
    licence="not stated; derived from VGGT-1B (CC BY-NC 4.0): treat as non-commercial",
    commercial=False,
    used_by=("reconviagen",),
    roles=(*NETWORK_ROLES.values(), *CONDITION_ROLES),
)
VGGT_OBJECT = WeightSet(
    name="vggt-object",
    source="Stable-X/vggt-object-v0-1",
    revision=None,
    files=(WeightFile("config.json"), WeightFile("model.safetensors")),
    licence="not stated; derived from VGGT-1B (CC BY-NC 4.0): treat as non-commercial",
    commercial=False,
    used_by=("reconviagen",),
)

WEIGHT_SETS = {s.name: s for s in (TRELLIS, DINOV2, RECONVIAGEN, VGGT_OBJECT)}


def sets_for(name: str) -> tuple[WeightSet, ...]:
    """The set of that name, or all sets that the model of that name needs; empty for an unknown name."""
    needed = tuple(s for s in WEIGHT_SETS.values() if name in s.used_by)
    if needed:
        return needed
    return tuple(s for s in WEIGHT_SETS.values() if name in (s.name, s.source))
