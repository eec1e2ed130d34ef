"""What untrusted input may cost, at most. Every cap is checked before the bytes behind it are decoded."""

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Caps on one view set.

    views: more are thinned out evenly, with a warning. listed_views: more are refused.
    pixels: per image. min_side: the shorter side of an image, pixels. file_bytes, json_bytes: per file.
    total_bytes: the views that are used with their masks and depth maps; also, all that an archive unpacks to.
    zip_bytes: the archive itself.
    zip_entries, zip_ratio (unpacked over packed bytes, for entries above 1 MiB), path_depth: inside an archive.
    sfm_seconds: of structure from motion, wall clock.
    """

    views: int = 64
    listed_views: int = 2000
    pixels: int = 50_000_000
    min_side: int = 16
    file_bytes: int = 64 * MIB
    json_bytes: int = 16 * MIB
    total_bytes: int = 2048 * MIB
    zip_bytes: int = 1024 * MIB
    zip_entries: int = 4096
    zip_ratio: float = 100.0
    path_depth: int = 8
    sfm_seconds: float = 1800.0
