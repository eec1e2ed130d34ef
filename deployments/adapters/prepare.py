"""engines.Preparer on the library."""

from pathlib import Path
from typing import Any

from viewmesh.errors import InputError
from viewmesh.options import Options
from viewmesh.refine import posed_by_sfm, read_views, unposed_because
from viewmesh.views.archive import save_viewset
from viewmesh.views.viewset import ViewSet


class LibraryPreparer:
    def prepare(
        self, source: Path, options: dict[str, Any], out: Path, progress: Any, cancelled: Any
    ) -> dict[str, Any]:
        chosen, work = Options.model_validate(options), out.parent / "work"
        views = read_views(source, chosen, workdir=work, progress=progress, cancelled=cancelled)
        return _saved(views, out)

    def pose(self, source: Path, options: dict[str, Any], out: Path, progress: Any, cancelled: Any) -> dict[str, Any]:
        chosen, work = Options.model_validate(options), out.parent / "work"
        try:
            views = posed_by_sfm(source, chosen, workdir=work, progress=progress, cancelled=cancelled)
        except InputError as error:
            return {"reason": unposed_because(error)}
        return _saved(views, out)


def _saved(views: ViewSet, out: Path) -> dict[str, Any]:
    save_viewset(views, out)
    return {
        "views": len(views),
        "camera_source": views.camera_source,
        "mask_source": views.mask_source,
        "warnings": list(views.warnings),
    }
