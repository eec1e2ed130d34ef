"""A refinement in the optimiser's replica, on a CPU and small: it stops when told, and goes on where it was lost."""

import asyncio
import json
import time
from contextlib import aclosing

import pytest
import safetensors
import synthetic_views as synthetic
import torch
from test_optimiser import last, replica_on, small  # noqa: F401 - small is a fixture

from deployments.messages import Done, Progress
from viewmesh import refine
from viewmesh.geometry.meshfile import save_mesh
from viewmesh.nvdiffrec import fit, register
from viewmesh.nvdiffrec.register import Plan
from viewmesh.options import Options
from viewmesh.views.archive import save_viewset

TINY = Plan(rotations=64, candidates=2, coarse_steps=1, finalists=1, fine_size=48, fine_steps=2, polish_size=48)


@pytest.fixture
def replica(small, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(register, "ENOUGH_IOU", 0.0)
    monkeypatch.setattr(refine, "PLAN", TINY)
    return replica_on(tmp_path)


@pytest.fixture
def call(replica) -> dict:
    views, mesh = replica.store.spool(), replica.store.spool()
    save_viewset(synthetic.viewset(synthetic.around(6)), views)
    save_mesh(synthetic.textured_ball(), mesh)
    options = Options(model="trellis", refine=True)
    return {
        "job_id": "a",
        "options": options.model_dump(mode="json"),
        "views": replica.store.put(views, "jobs/a/views.safetensors", move=True).json(),
        "initial": replica.store.put(mesh, "jobs/a/generated.safetensors", move=True).json(),
        "checkpoint": None,
    }


async def finished(replica_of, call: dict, *, lost: bool) -> tuple[dict, dict, int]:
    """The facts, tensors and number of slices of a whole refinement; replica_of: slice → the replica it runs on.
    lost: another one for each."""
    number = 0
    while not call.get("done"):
        made = await last(replica_of(number).slice(call))
        assert isinstance(made, Done), made
        assert made.value["resumed"] == (lost and number > 0)
        call = {**call, "checkpoint": made.value["checkpoint"], "done": made.value["done"]}
        number += 1
    replica = replica_of(number)
    made = await last(replica.finish(call))
    assert isinstance(made, Done), made
    with safetensors.safe_open(replica.store.fetch(made.value["result"], replica.store.spool()), "pt") as file:
        return made.value["facts"], {name: file.get_tensor(name) for name in file.keys()}, number  # noqa: SIM118


@pytest.mark.parametrize("enough", [0.0, 1.1], ids=["placed", "not placed"])
async def test_replicas_that_are_lost_between_slices_change_nothing(replica, call, tmp_path, monkeypatch, enough):
    monkeypatch.setattr(register, "ENOUGH_IOU", enough)
    replica.reconfigure({"slice_s": 0.5})

    def another(number: int):
        made = replica_on(tmp_path)
        made.reconfigure({"slice_s": 0.5})
        return made

    facts, mesh, _ = await finished(lambda number: replica, call, lost=False)
    again, same, slices = await finished(another, {**call, "job_id": "b"}, lost=True)
    assert slices >= (2 if enough == 0 else 1)
    assert again == facts
    assert facts["refinement"]["kept"] in ((True, False) if enough == 0 else (False,))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert mesh.keys() == same.keys()
    for name, values in mesh.items():
        assert torch.equal(values, same[name]), name


async def stopped(messages, until) -> float:
    """Seconds from leaving the call, once `until` says so, to its end."""
    async with aclosing(messages):
        async for message in messages:
            assert isinstance(message, Progress), message
            if until():
                break
        began = time.monotonic()
    return time.monotonic() - began


@pytest.mark.parametrize("part", ["search", "_aligned", "distinct"])
async def test_a_cancel_while_the_mesh_is_being_registered(replica, call, monkeypatch, part):
    monkeypatch.setattr(refine, "PLAN", Plan())  # the whole search: half a minute here
    whole, reached = getattr(register, part), []

    def noted(*args):
        reached.append(part)
        return whole(*args)

    monkeypatch.setattr(register, part, noted)
    assert await stopped(replica.slice(call), lambda: reached) < 2
    assert not replica.warm
    monkeypatch.setattr(refine, "PLAN", TINY)
    assert isinstance(await last(replica.slice(call)), Done)  # the replica is free


async def test_a_cancel_while_the_mesh_is_being_fitted(replica, call, tmp_path, monkeypatch):
    made = await last(replica.slice(call))
    assert isinstance(made, Done), made
    call, step, begun = {**call, "checkpoint": made.value["checkpoint"]}, fit.texture_step, []

    def slow(*args, **given):
        begun.append(True)
        time.sleep(0.3)
        return step(*args, **given)

    monkeypatch.setattr(fit, "texture_step", slow)
    another = replica_on(tmp_path)  # begins at the checkpoint; the first went on while it wrote that
    fitting = asyncio.create_task(last(another.slice(call)))
    while not (begun or fitting.done()):
        await asyncio.sleep(0.02)
    stopped = len(begun)
    fitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fitting
    assert 1 <= len(begun) <= stopped + 1  # of eight
    assert not another.warm
