"""engines.Generator on viewmesh.generate. Importing it imports torch: only replicas do."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deployments.adapters.device import OnDevice
from deployments.adapters.meshfile import save_mesh
from deployments.engines import POSED
from deployments.running import out_of_device_memory
from deployments.turns import Turns
from viewmesh.generate import Draft, Looked, draft_together, finish, fit_together, load_model, look, total_steps
from viewmesh.options import Options
from viewmesh.progress import check
from viewmesh.refine import with_cameras
from viewmesh.trellis.pipeline import Trellis
from viewmesh.views.archive import load_viewset, save_viewset
from viewmesh.weights.ready import licence_notes, revision

log = logging.getLogger("ray.serve")
TOGETHER = 4  # calls on the device at once


class LibraryGenerator(OnDevice):
    """model: trellis or reconviagen. device: auto, cpu or cuda. weights: folders by weight set, see weights.ready.

    TRELLIS runs the calls that wait for the device together, at most `together` of them; ReconViaGen one at a time.
    Raises MissingModel, InputError or OutOfMemory (before allocating, with both figures).
    """

    def __init__(self, model: str, device: str = "auto", weights: dict[str, str] | None = None) -> None:
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.name, self.device, self.weights = model, torch.device(chosen), weights or {}
        self.model = load_model(model, self.device, self.weights)
        self.together = TOGETHER
        self.turns: Turns[Looked, tuple[Draft, int]] = Turns(self._draft, self._most)

    def warm(self) -> dict[str, float]:
        return self.model.warm(batches=self.together > 1) if isinstance(self.model, Trellis) else self.model.warm()

    def generate(
        self, views: Path, options: dict[str, Any], out: Path, progress: Any, cancelled: Any
    ) -> dict[str, Any]:
        chosen, viewset = Options.model_validate(options), load_viewset(views)
        total = total_steps(self.model, chosen)

        def while_waiting() -> None:
            check(cancelled)
            progress("generate", 0, total)  # a sign of life

        looked = look(self.model, viewset, chosen, progress=progress, cancelled=cancelled)
        drafted, together = self.turns.take(looked, looked.company, while_waiting)
        made = finish(drafted, chosen, progress=progress, cancelled=cancelled, total=total)
        save_mesh(made.mesh, out, made.gaussians)
        if chosen.refine and viewset.cameras is None:
            save_viewset(with_cameras(self.model, viewset), out.with_name(POSED))
        return {
            "device": str(self.device),
            "weights_revision": revision(self.name, self.weights),
            "licence_notes": list(licence_notes(self.name)),
            "model_warnings": list(made.warnings),
            "generate_seconds": {part: round(seconds, 3) for part, seconds in made.seconds.items()},
            "generated_together": together,
        }

    def _most(self) -> int:
        return 1 if self.together == 1 else min(self.together, fit_together(self.model))

    def _draft(self, calls: Sequence[Looked]) -> list[tuple[Draft, int] | Exception]:
        try:
            drafts = draft_together(self.model, calls)
        except Exception as error:
            if len(calls) == 1 or not out_of_device_memory(error):
                raise
            log.warning(f"{len(calls)} calls did not fit on the device together: {str(error).splitlines()[0]}")
        else:
            return [one if isinstance(one, Exception) else (one, len(calls)) for one in drafts]
        self.release()  # outside the handler: the exception held what the batch had allocated
        return [self._alone(call) for call in calls]

    def _alone(self, call: Looked) -> tuple[Draft, int] | Exception:
        try:
            return self._draft([call])[0]
        except Exception as error:
            return error
