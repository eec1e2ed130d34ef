"""engines.ResultWriter on viewmesh.export."""

import json
from pathlib import Path
from typing import Any

from viewmesh.errors import InvalidMesh
from viewmesh.export.result import Reconstruction
from viewmesh.export.store import reexport
from viewmesh.export.write import export
from viewmesh.geometry.meshfile import load_gaussians, load_mesh, load_previews
from viewmesh.options import Options
from viewmesh.progress import check
from viewmesh.refine import unposed
from viewmesh.views.archive import load_viewset


class LibraryWriter:
    def export(
        self,
        result: Path,
        views: Path | None,
        folder: Path,
        options: dict[str, Any],
        facts: dict[str, Any],
        progress: Any,
        cancelled: Any,
    ) -> dict[str, Any]:
        """facts["reexport"]: target_faces and texture_size of an export that came after the reconstruction."""
        chosen = Options.model_validate(options)
        if views is None:
            raise InvalidMesh("The result has lost its views.")
        viewset = load_viewset(views)
        refinement = facts.get("refinement")
        if refinement is not None and "before" not in refinement:
            viewset = unposed(viewset)
        value = Reconstruction(
            mesh=load_mesh(result),
            views=viewset,
            world_from_scene=viewset.world_from_scene,
            model=chosen.model,
            preset=chosen.preset,
            seed=chosen.seed,
            seconds=_seconds(facts),
            device=facts.get("device", "cpu"),
            weights_revision=facts.get("weights_revision", ""),
            licence_notes=tuple(facts.get("licence_notes", ())),
            warnings=(*viewset.warnings, *facts.get("model_warnings", ()), *facts.get("refine_warnings", ())),
            gaussians=load_gaussians(result),
            chosen_because=facts.get("chosen_because", ""),
            refinement=refinement,
            generated_together=facts.get("generated_together", 1),
            previews=load_previews(result),
        )
        if facts.get("reexport"):
            value = reexport(value, **facts["reexport"], cancelled=cancelled)
        check(cancelled)

        def stoppable(stage: str, step: int, steps: int, **metrics: float) -> None:
            check(cancelled)
            progress(stage, step, steps, **metrics)

        files = export(value, folder, chosen.formats, progress=stoppable)
        return json.loads(files["report.json"].read_text())


def _seconds(facts: dict[str, Any]) -> dict[str, float]:
    parts = {f"generate.{part}": seconds for part, seconds in facts.get("generate_seconds", {}).items()}
    return {**facts.get("seconds", {}), **parts}
