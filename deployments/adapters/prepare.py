"""engines.Preparer on the library."""

from pathlib import Path
from typing import Any

from viewmesh.options import Options
from viewmesh.views.archive import save_viewset
from viewmesh.views.load import load_views


class LibraryPreparer:
    def prepare(
        self, source: Path, options: dict[str, Any], out: Path, progress: Any, cancelled: Any
    ) -> dict[str, Any]:
        rules = Options.model_validate(options).view_rules
        views = load_views(source, rules, workdir=out.parent / "work", progress=progress, cancelled=cancelled)
        save_viewset(views, out)
        return {
            "views": len(views),
            "camera_source": views.camera_source,
            "mask_source": views.mask_source,
            "warnings": list(views.warnings),
        }
