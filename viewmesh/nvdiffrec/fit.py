"""START HERE. The optimiser: one mesh, its PBR material and its light, fitted to posed views by rendering.

    state = start(views, preset, generator)
    while not state.done:
        state, metrics = advance(state, seconds=10)
    mesh = finish(state)

Munkberg et al. 2022, "Extracting Triangular 3D Models, Materials, and Lighting From Images" (nvdiffrec), with a start
from the visual hull or depth instead of noise. A State is a value: advancing makes another one; saving one, loading it
and going on gives, on a CPU, bit for bit what not stopping would have given. Randomness comes from a seed and the
step's number alone.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor

from viewmesh.errors import InputError
from viewmesh.geometry.mesh import Material, Mesh, TexturedMesh
from viewmesh.nvdiffrec.match import Comparison, compare
from viewmesh.nvdiffrec.memory import check_memory
from viewmesh.nvdiffrec.optim import Moments, Variables, zero_moments
from viewmesh.nvdiffrec.presets import Preset
from viewmesh.nvdiffrec.problem import Problem
from viewmesh.nvdiffrec.repeatable import repeatable
from viewmesh.nvdiffrec.shape import BAND_EVERY
from viewmesh.nvdiffrec.shape_pass import new_variables, shape_step
from viewmesh.nvdiffrec.sparse import packed, unpacked
from viewmesh.nvdiffrec.stream import write_safetensors
from viewmesh.nvdiffrec.surface import Cleaned, Surface, baked, cleaned, from_mesh, unwrapped
from viewmesh.nvdiffrec.texture_pass import texture_step
from viewmesh.progress import Progress, check, never, silent
from viewmesh.render.light import latlong
from viewmesh.render.rasterizer import topology
from viewmesh.views.viewset import ViewSet

Phase = Literal["shape", "clean", "unwrap", "bake", "texture", "done"]
Metrics = dict[str, float]
PASSES: tuple[Phase, ...] = ("shape", "texture")  # of many short steps
BETWEEN: tuple[Phase, ...] = ("clean", "unwrap", "bake")  # the passes: one long step each
FORMAT = 4  # of the saved state
REPORT_EVERY = 10  # steps between two calls of progress


@dataclass(frozen=True, eq=False)
class State:
    """Where a fit stands. `step` counts within the phase; `band` (T,) bool is the part of the lattice looked at.

    cleaned: from "unwrap" to "bake". surface: from "bake" on.
    notes: JSON of whoever started the fit, kept with it.
    """

    problem: Problem
    seed: int
    phase: Phase
    step: int
    variables: Variables
    moments: Moments
    band: Tensor | None = None
    cleaned: Cleaned | None = None
    surface: Surface | None = None
    initial: TexturedMesh | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.phase == "done"

    @property
    def steps_done(self) -> int:
        """Of `steps`, counting each of the steps between the passes as one."""
        shape = self.problem.preset.shape_steps
        between = {phase: shape + n for n, phase in enumerate(BETWEEN)}
        before = {"shape": 0, **between, "texture": shape + len(BETWEEN), "done": self.steps}
        return before[self.phase] + self.step

    @property
    def steps(self) -> int:
        return self.problem.preset.shape_steps + len(BETWEEN) + self.problem.preset.texture_steps


def start(
    views: ViewSet,
    preset: Preset,
    generator: torch.Generator,
    initial: Mesh | TexturedMesh | None = None,
    *,
    device: torch.device | str = "cpu",
    cancelled: Callable[[], bool] = never,
) -> State:
    """The state before the first step.

    views must have cameras. initial: a mesh in the scene frame to refine; then there is no shape pass, and `finish`
    keeps the refined mesh only if it matches the views better. Raises InputError, InvalidMesh, EmptyReconstruction,
    OutOfMemory, and Cancelled between two views or while a mesh without UVs is unwrapped.
    """
    device = torch.device(device)
    if views.cameras is None:
        raise InputError(
            "The views have no cameras and nvdiffrec needs them.",
            hint="Give cameras.json, use the six-view rig, or let structure from motion pose the photos.",
        )
    check_memory(preset, len(views), views.height, views.width, device)
    problem = Problem(views, preset, device)
    seed = int(torch.randint(2**62, (), generator=generator))
    if initial is None:
        problem.prepare("shape", cancelled)
        check(cancelled)
        variables = new_variables(problem)
        return State(problem, seed, "shape", 0, variables, zero_moments(variables))
    surface, variables = from_mesh(problem, initial.validate(), cancelled)
    given = _textured(problem, surface, variables)
    return State(problem, seed, "texture", 0, variables, zero_moments(variables), surface=surface, initial=given)


def advance(
    state: State,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    enough: Callable[[], bool] | None = None,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> tuple[State, Metrics]:
    """The state some steps or seconds later or once it is `enough`, whichever comes first (all None: at the end), and
    its last metrics.

    The given state stays as it was. One step is always made. With `seconds` or `enough` a call ends with its phase,
    too, so that each of the long steps between the passes (see `surface`) begins a call of its own and is all that a
    call which dies in it can lose. Raises Cancelled between two steps, and between the parts of a long one: a second or
    two apart on a machine that does nothing else. What a loaded state does not have of the views is computed first.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    work, metrics, made = _Work(state, cancelled), {}, 0
    last = False
    while not work.state.done and not last:
        check(cancelled)
        state.problem.prepare(work.state.phase, cancelled)
        phase_ends = work.phase_ends
        over = (deadline is not None and time.monotonic() >= deadline) or (enough is not None and enough())
        sliced = deadline is not None or enough is not None
        last = made + 1 == steps or over or (sliced and phase_ends)
        report = last or phase_ends or work.state.steps_done % REPORT_EVERY == 0
        with repeatable(state.problem.device):
            metrics = work.step(report) or metrics
        made += 1
        if report:
            stage = "texture" if work.state.done else work.state.phase  # what is worked on from now on
            progress(stage, work.state.steps_done, work.state.steps, **metrics)
    return work.state, metrics


class _Work:
    """A private copy of a state's tensors, updated in place while one `advance` runs."""

    def __init__(self, state: State, cancelled: Callable[[], bool]) -> None:
        self.cancelled = cancelled
        moments = state.moments
        clone = lambda tensors: {name: t.clone() for name, t in tensors.items()}  # noqa: E731
        self.state = replace(
            state,
            variables=clone(state.variables),
            moments=Moments(clone(moments.first), clone(moments.second), moments.count),
        )
        self.shape = None  # made by the step that needs it: what it looks at may have to be computed, and stopped
        self.topology = None

    @property
    def phase_ends(self) -> bool:
        """Whether the next step is the last of its phase."""
        preset = self.state.problem.preset
        steps = {"shape": preset.shape_steps, "texture": preset.texture_steps}
        return self.state.step + 1 == steps.get(self.state.phase, 1)

    def step(self, report: bool) -> Metrics:
        phase = self.state.phase
        if phase in BETWEEN:
            return {"clean": self._clean, "unwrap": self._unwrap, "bake": self._bake}[phase]()
        return {"shape": self._shape, "texture": self._texture}[phase](report)

    def _shape(self, report: bool) -> Metrics:
        state, problem = self.state, self.state.problem
        if state.step % BAND_EVERY == 0:
            state = replace(state, band=problem.shape.band(state.variables["sdf"]))
            self.shape = None
        if self.shape is None:
            self.shape = problem.shape.focused(state.band)
        preset = problem.preset
        random, index = _draw(state, preset.shape_batch)
        moments, metrics = shape_step(
            problem, self.shape, state.variables, state.moments, index, random, state.step / preset.shape_steps,
            report=report,
        )  # fmt: skip
        self.state = replace(state, moments=moments, step=state.step + 1)
        if self.state.step == preset.shape_steps:
            variables = self.state.variables
            self.state = replace(self.state, phase="clean", step=0, band=None, moments=zero_moments(variables))
        return metrics

    def _clean(self) -> Metrics:
        made = cleaned(self.state.problem, self.state.variables, self.cancelled)
        self.state = replace(self.state, phase="unwrap", cleaned=made)
        return {"faces": float(len(made.light.faces))}

    def _unwrap(self) -> Metrics:
        assert self.state.cleaned is not None
        surface = unwrapped(self.state.problem, self.state.cleaned.light, self.cancelled)
        self.state = replace(self.state, phase="bake", surface=surface)
        return {"faces": float(len(surface.faces))}

    def _bake(self) -> Metrics:
        state = self.state
        assert state.cleaned is not None
        assert state.surface is not None
        variables = baked(state.problem, state.cleaned.dense, state.surface, state.variables, self.cancelled)
        self.state = replace(state, phase="texture", variables=variables, moments=zero_moments(variables), cleaned=None)
        return {"faces": float(len(state.surface.faces))}

    def _texture(self, report: bool) -> Metrics:
        state, preset = self.state, self.state.problem.preset
        assert state.surface is not None
        if self.topology is None:
            self.topology = topology(state.surface.faces)
        random, index = _draw(state, preset.texture_batch)
        moments, metrics = texture_step(
            state.problem, state.surface, self.topology, state.variables, state.moments, index, random,
            state.step / preset.texture_steps, report=report,
        )  # fmt: skip
        self.state = replace(state, moments=moments, step=state.step + 1)
        if self.state.step == preset.texture_steps:
            self.state = replace(self.state, phase="done", step=0)
        return metrics


def _draw(state: State, batch: int) -> tuple[torch.Generator, Tensor]:
    """The step's own generator, and which views (B,) it looks at: every view once before any is seen again."""
    count = len(state.problem.views)
    phase = {"shape": 0, "texture": 1}[state.phase]
    positions = torch.arange(state.step * batch, (state.step + 1) * batch)
    order = [
        torch.randperm(count, generator=torch.Generator().manual_seed(state.seed ^ (2 * (1000 + int(epoch)) + phase)))
        for epoch in (positions // count).unique()
    ]
    first = int(positions[0]) // count
    index = torch.stack([order[int(p) // count - first][int(p) % count] for p in positions])
    random = torch.Generator(state.problem.device).manual_seed(
        (state.seed * 6364136223846793005 + 2 * state.step + phase) % 2**63
    )
    return random, index


def finish(state: State) -> TexturedMesh:
    """The mesh of a finished state, in the scene frame, with the estimated light.

    With an initial mesh: the better of the two against the input views (see `match.compare`).
    """
    fitted = _fitted(state)
    return fitted if state.initial is None else compare(state.problem, state.initial, fitted).mesh


def finish_compared(state: State) -> Comparison:
    """As `finish` for a fit that began with a mesh, with the figures of both."""
    assert state.initial is not None, "there is nothing to compare with"
    return compare(state.problem, state.initial, _fitted(state))


def _fitted(state: State) -> TexturedMesh:
    if not state.done or state.surface is None:
        raise ValueError(f"The fit has made {state.steps_done} of {state.steps} steps; advance it to the end first.")
    return _textured(state.problem, state.surface, state.variables).validate()


@torch.no_grad()
def _textured(problem: Problem, surface: Surface, variables: Variables) -> TexturedMesh:
    cpu = {name: v.detach().cpu() for name, v in variables.items()}
    return TexturedMesh(
        mesh=Mesh(surface.vertices.cpu() + cpu["offset"], surface.faces.cpu()),
        uvs=surface.uvs.cpu(),
        uv_faces=surface.uv_faces.cpu(),
        material=Material(cpu["base_color"], cpu["orm"], torch.nn.functional.normalize(cpu["normal_map"], dim=-1)),
        environment=latlong(cpu["light"], 64),
    )


def save(state: State, path: Path) -> str:
    """One safetensors file that holds everything but the views; written beside `path`, through to the disk, and then
    moved there. Returns its sha256."""
    tensors = {f"variables/{k}": v for k, v in state.variables.items()}
    tensors |= {f"first/{k}": v for k, v in state.moments.first.items()}
    tensors |= {f"second/{k}": v for k, v in state.moments.second.items()}
    if state.band is not None:
        tensors["band"] = state.band
    if state.cleaned is not None:
        for name, mesh in vars(state.cleaned).items():
            tensors |= {f"cleaned/{name}/vertices": mesh.vertices, f"cleaned/{name}/faces": mesh.faces}
    if state.surface is not None:
        tensors |= {f"surface/{k}": v for k, v in vars(state.surface).items()}
    if state.initial is not None:
        tensors |= {f"initial/{k}": v for k, v in _flat(state.initial).items()}
    tensors, contents = packed(tensors)
    header = {
        "format": FORMAT, "contents": contents, "seed": state.seed, "phase": state.phase, "step": state.step,
        "count": state.moments.count, "preset": asdict(state.problem.preset), "views": state.problem.fingerprint,
        "notes": state.notes, "steps_done": state.steps_done,
    }  # fmt: skip
    temporary = path.with_name(path.name + ".part")
    try:
        sha256 = write_safetensors(temporary, tensors, {"viewmesh": json.dumps(header)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return sha256


def steps_saved(path: Path) -> int | None:
    """How many steps a saved fit has made; None where there is none that says so."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["viewmesh"])["steps_done"]
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        return None


def load(path: Path, views: ViewSet, *, device: torch.device | str = "cpu") -> State:
    """The state that `save` wrote, for the same views. Raises InputError when the file does not belong to them."""
    device = torch.device(device)
    again = "Start again without --resume."
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {})["viewmesh"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        version, fingerprint, numbers = header["format"], header["views"], dict(header["preset"])
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise InputError("is not a saved fit.", file=path.name, hint=again) from error
    if version != FORMAT or numbers.keys() != {f.name for f in fields(Preset)}:
        raise InputError("was saved by another version of viewmesh.", file=path.name, hint=again)
    named: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()}
    problem = Problem(views, Preset(**named), device)
    if fingerprint != problem.fingerprint:
        raise InputError("belongs to another view set.", file=path.name, hint=again)
    try:
        tensors = unpacked(tensors, header["contents"])
    except KeyError as error:
        raise InputError("is not a saved fit.", file=path.name, hint=again) from error

    def part(prefix: str) -> Variables:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    variables = part("variables/")
    moments = Moments(part("first/"), part("second/"), header["count"])
    surface, initial = part("surface/"), part("initial/")
    dense, light = (
        Mesh(**{k: v.cpu() for k, v in mesh.items()}) if (mesh := part(f"cleaned/{name}/")) else None
        for name in ("dense", "light")
    )
    return State(
        problem=problem,
        seed=header["seed"],
        phase=header["phase"],
        step=header["step"],
        variables=variables,
        moments=moments,
        band=tensors.get("band"),
        cleaned=Cleaned(dense, light) if dense and light else None,
        surface=Surface(**surface) if surface else None,
        initial=_unflat({k: v.cpu() for k, v in initial.items()}) if initial else None,
        notes=header.get("notes", {}),
    )


def _flat(mesh: TexturedMesh) -> Variables:
    named = {
        "vertices": mesh.mesh.vertices, "faces": mesh.mesh.faces, "uvs": mesh.uvs, "uv_faces": mesh.uv_faces,
        "base_color": mesh.material.base_color, "orm": mesh.material.orm, "normal": mesh.material.normal,
    }  # fmt: skip
    return named if mesh.environment is None else {**named, "environment": mesh.environment}


def _unflat(named: Variables) -> TexturedMesh:
    return TexturedMesh(
        Mesh(named["vertices"], named["faces"]),
        named["uvs"],
        named["uv_faces"],
        Material(named["base_color"], named["orm"], named["normal"]),
        named.get("environment"),
    )
