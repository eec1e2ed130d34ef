"""The picture of a fit that is still running: it shows the object where the first view has it, in every phase."""

from dataclasses import replace

import pytest
import synthetic_views as synthetic
import tiny
import torch

from viewmesh.nvdiffrec.fit import State, advance
from viewmesh.nvdiffrec.preview import preview
from viewmesh.render.shading import srgb_to_linear


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    """By phase."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.coarse_field(patch)
        state, found = tiny.started(synthetic.viewset(synthetic.around(12))), {}
        while not state.done:
            found[state.phase] = state
            state, _ = advance(state, seconds=600)
        return {**found, "done": state}


def test_every_phase_shows_the_object_as_the_first_view_does(states: dict[str, State]):
    assert list(states) == ["shape", "clean", "unwrap", "bake", "texture", "done"]
    for phase, state in states.items():
        shown = preview(state, size=48)
        assert shown is not None
        assert (shown.shape, shown.dtype) == ((48, 48, 4), torch.uint8)
        theirs = state.problem.shape_targets.images[0]
        ours, mask = shown[..., 3] > 127, theirs[..., 3] > 127
        assert float((ours & mask).sum() / (ours | mask).sum()) > 0.85, phase
    before, after = (error(states[phase]) for phase in ("shape", "done"))
    assert after < before / 2


def error(state: State) -> float:
    """Of linear colours, where both have some."""
    shown, theirs = preview(state, size=48), state.problem.shape_targets.images[0]
    assert shown is not None
    both = (shown[..., 3] > 250) & (theirs[..., 3] > 250)
    ours, truth = (srgb_to_linear(image[both][:, :3].float() / 255) for image in (shown, theirs))
    return float((ours - truth).abs().mean())


def test_a_surface_that_has_vanished_has_no_picture(states: dict[str, State]):
    start = states["shape"]
    assert (
        preview(replace(start, variables={**start.variables, "sdf": torch.ones_like(start.variables["sdf"])})) is None
    )
