"""engines.Generator on viewmesh.generate. Importing it imports torch: only replicas do."""

import threading
from pathlib import Path
from typing import Any

import torch

from deployments.adapters.meshfile import save_mesh
from viewmesh.generate import draft, finish, load_model, total_steps
from viewmesh.options import Options
from viewmesh.progress import check
from viewmesh.views.archive import load_viewset
from viewmesh.weights.ready import licence_notes, revision

LOOK_S = 0.5  # how often a call that waits for its turn looks whether it is still wanted


class LibraryGenerator:
    """model: trellis or reconviagen. device: auto, cpu or cuda. weights: folders by weight set, see weights.ready.

    Raises MissingModel, InputError or OutOfMemory (before allocating, with both figures).
    """

    def __init__(self, model: str, device: str = "auto", weights: dict[str, str] | None = None) -> None:
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.name, self.device, self.weights = model, torch.device(chosen), weights or {}
        self.model = load_model(model, self.device, self.weights)
        self.turn = threading.Lock()

    def warm(self) -> dict[str, float]:
        return self.model.warm()

    def generate(
        self, views: Path, options: dict[str, Any], out: Path, progress: Any, cancelled: Any
    ) -> dict[str, Any]:
        chosen, viewset = Options.model_validate(options), load_viewset(views)
        total = total_steps(self.model, chosen)
        while not self.turn.acquire(timeout=LOOK_S):
            check(cancelled)
            progress("generate", 0, total)  # a sign of life
        try:
            drafted = draft(self.model, viewset, chosen, progress=progress, cancelled=cancelled)
        finally:
            self.turn.release()
        made = finish(drafted, chosen, progress=progress, cancelled=cancelled, total=total)
        save_mesh(made.mesh, out, made.gaussians)
        return {
            "device": str(self.device),
            "weights_revision": revision(self.name, self.weights),
            "licence_notes": list(licence_notes(self.name)),
            "model_warnings": list(made.warnings),
            "generate_seconds": {part: round(seconds, 3) for part, seconds in made.seconds.items()},
        }

    def release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory(self) -> dict[str, int]:
        if self.device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self.device)
        return {"used": torch.cuda.memory_allocated(self.device), "free": free, "total": total}
