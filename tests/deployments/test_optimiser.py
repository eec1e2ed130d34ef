"""The real optimiser in a replica, on a CPU and small: memory that runs out, a cancel in its longest step, pictures."""

import asyncio
import io
import json
import os
import sys
import time
import weakref
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import synthetic_views as synthetic
import torch
from PIL import Image

from deployments.adapters import nvdiffrec as adapter
from deployments.messages import Done, Failed
from deployments.nvdiffrec import Nvdiffrec
from viewmesh.geometry import hull, unwrap
from viewmesh.nvdiffrec import fit, presets, problem
from viewmesh.nvdiffrec.initial import initial_field
from viewmesh.options import Options
from viewmesh.views.archive import save_viewset

SMALL = replace(
    adapter.preset("preview", "cpu"), lattice=14, shape_steps=24, shape_size=48, shape_batch=2,
    volume=(8, 16), light_size=8, texture_steps=8, texture_crop=64, texture_batch=2, target_faces=400, texture_size=64,
)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """The presets are small, and torch has after the test the threads that it had before."""
    monkeypatch.setattr(problem, "initial_field", partial(initial_field, resolution=40))
    monkeypatch.setattr(presets, "preset", lambda name, device, **_: SMALL)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def replica_on(folder: Path):
    made = Nvdiffrec.func_or_class(
        f"file://{folder}/store", "deployments.adapters.nvdiffrec:NvdiffrecOptimiser", {"device": "cpu"}
    )
    made.reconfigure({"slice_s": 10})
    return made


@pytest.fixture
def replica(small, tmp_path):
    return replica_on(tmp_path)


@pytest.fixture
def call(replica) -> dict:
    file = replica.store.spool()
    save_viewset(synthetic.viewset(synthetic.around(12)), file)
    views = replica.store.put(file, "jobs/a/views.safetensors", move=True)
    return {"job_id": "a", "options": Options().model_dump(mode="json"), "views": views.json(), "checkpoint": None}


async def last(messages):
    return [message async for message in messages][-1]


async def slices(replica, call, phase: str) -> dict:
    """The call that begins a phase."""
    while True:
        (_, session), *_ = replica.warm.values() or [("", None)]
        if session is not None and session.state.phase == phase:
            return call
        made = await last(replica.slice(call))
        assert isinstance(made, Done), made
        call = {**call, "checkpoint": made.value["checkpoint"]}


def stored(replica, ref, folder: Path) -> dict:
    """The preset in a checkpoint."""
    with safetensors.safe_open(replica.store.fetch(ref, folder), framework="pt") as file:
        return json.loads(file.metadata()["viewmesh"])["preset"]


async def test_out_of_memory_goes_on_from_the_checkpoint_with_half_the_views(replica, call, tmp_path, monkeypatch):
    call = await slices(replica, call, "clean")
    lost, whole, tried = [], fit.advance, []

    def advance(state, **given):
        tried.append((state.steps_done, state.problem.preset.shape_batch))
        if not lost:
            lost.append(weakref.ref(state))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        assert lost[0]() is None  # what filled the device is gone before the next attempt
        return whole(state, **given)

    monkeypatch.setattr(fit, "advance", advance)
    made = await last(replica.slice(call))
    assert isinstance(made, Done), made
    assert tried == [(24, 2), (24, 1)]
    assert (made.value["smaller"], made.value["step"]) == (True, 25)
    assert stored(replica, made.value["checkpoint"], tmp_path)["shape_batch"] == 1

    # another replica: half the preset's views, not half of half
    call = {**call, "checkpoint": made.value["checkpoint"], "smaller": True}
    made = await last(replica_on(tmp_path).slice(call))
    assert isinstance(made, Done), made
    numbers = stored(replica, made.value["checkpoint"], tmp_path)
    assert (numbers["shape_batch"], numbers["texture_batch"]) == (1, 1)


async def test_out_of_memory_twice_fails_the_job(replica, call, monkeypatch):
    def advance(state, **given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(fit, "advance", advance)
    made = await last(replica.slice(call))
    assert isinstance(made, Failed)
    assert made.code == "out_of_memory"
    assert "2.00 GiB" in made.message
    replica.check_health()


async def test_a_cancel_while_the_fit_looks_at_its_views(replica, call, monkeypatch):
    whole, reached = hull._looked_up, []

    def slow(*args):
        reached.append(True)
        time.sleep(0.3)  # a view of a big capture on a busy machine
        return whole(*args)

    monkeypatch.setattr(hull, "_looked_up", slow)
    started = asyncio.create_task(last(replica.slice(call)))
    while not reached:
        await asyncio.sleep(0.02)
    stopped = len(reached)
    started.cancel()
    with pytest.raises(asyncio.CancelledError):
        await started
    assert len(reached) <= stopped + 1  # of twelve
    monkeypatch.undo()
    assert not replica.warm


async def test_a_cancel_while_unwrapping_ends_it_and_its_child(replica, call, tmp_path, monkeypatch):
    call = await slices(replica, call, "unwrap")
    begun = tmp_path / "pid"
    work = f"import os, time; open({str(begun)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(unwrap, "CHILD", (sys.executable, "-c", work))
    replica.worker.stall_s = 1.0
    started = time.monotonic()
    async with aclosing(replica.slice(call)) as messages:
        waiting = asyncio.ensure_future(anext(messages))
        while not (begun.exists() and begun.read_text()) or time.monotonic() - started < 2:
            await asyncio.sleep(0.05)
            replica.check_health()  # two seconds without progress, but it asks, so it lives
        stopped = time.monotonic()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert time.monotonic() - stopped < 2
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)
    monkeypatch.undo()
    assert isinstance(await last(replica.slice(call)), Done)


async def test_each_slice_leaves_a_picture(replica, call, tmp_path):
    call = await slices(replica, call, "texture")
    made = await last(replica.slice(call))
    data = replica.store.fetch(made.value["preview"], tmp_path).read_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert pixels.shape == (256, 256, 4)
    assert 0.05 < (pixels[..., 3] > 127).mean() < 0.95
    assert len(data) < 200_000


async def test_a_fit_goes_on_while_its_checkpoint_is_written(replica, call, tmp_path, monkeypatch):
    """And a lost replica's successor, who begins at the checkpoint, ends where this one does, bit for bit."""
    create = replica.store.create

    def slowly(write, key):
        time.sleep(0.5)
        return create(write, key)

    monkeypatch.setattr(replica.store, "create", slowly)
    replica.reconfigure({"slice_s": 0})  # the slice itself makes a single step
    made = await last(replica.slice(call))
    assert isinstance(made, Done), made
    ((_, session),) = replica.warm.values()
    assert made.value["step"] == 1 < session.step <= 24

    ends = []
    for other in (replica, replica_on(tmp_path)):
        given, resumed = {**call, "checkpoint": made.value["checkpoint"]}, []
        while True:
            further = await last(other.slice(given))
            resumed.append(further.value["resumed"])
            given = {**given, "checkpoint": further.value["checkpoint"]}
            if further.value["done"]:
                break
        assert resumed[0] == (other is not replica)
        assert not any(resumed[1:])
        ends.append(safetensors.torch.load_file(other.store.fetch(given["checkpoint"], tmp_path, "end")))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


async def test_out_of_memory_beside_a_checkpoint_is_the_next_slices(replica, call, monkeypatch):
    def go_on(self, enough, progress, cancelled):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(adapter.NvdiffrecSession, "go_on", go_on)
    made = await last(replica.slice(call))
    assert isinstance(made, Done), made
    assert not replica.warm
    monkeypatch.undo()
    further = await last(replica.slice({**call, "checkpoint": made.value["checkpoint"]}))
    assert further.value["resumed"]
