"""engines.Preparer on the library."""

from pathlib import Path
from typing import Any

from viewmesh.options import Options
from viewmesh.refine import read_views
from viewmesh.views.archive import save_viewset


class LibraryPreparer:
    def prepare(
        self, source: Path, options: dict[str, Any], out: Path, progress: Any, cancelled: Any
    ) -> dict[str, Any]:
        chosen, work = Options.model_validate(options), out.parent / "work"
        views = read_views(source, chosen, workdir=work, progress=progress, cancelled=cancelled)
        save_viewset(views, out)
        return {
            "views": len(views),
            "camera_source": views.camera_source,
            "mask_source": views.mask_source,
            "warnings": list(views.warnings),
        }
