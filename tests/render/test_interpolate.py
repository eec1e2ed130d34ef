"""Interpolation by every back-end against the naive twin."""

import naive
import torch
from scenes import H, W, close, generator, scene


def test_interpolate_agrees_with_the_twin(backend):
    rasterizer, device = backend
    clip, faces = scene()
    rast, db = (t.detach() for t in naive.rasterize(clip, faces, 8, 9))
    rast, db = rast.reshape(-1, 4), db.reshape(-1, 4)
    attributes = torch.randn(12, 5, generator=generator(), dtype=torch.float64)
    g_out = torch.randn(len(rast), 5, generator=generator(1), dtype=torch.float64)
    g_da = torch.randn(len(rast), 10, generator=generator(2), dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (attributes, rast, db)]
    out, da = naive.interpolate(inputs[0], inputs[1], faces, inputs[2])
    ((out * g_out).sum() + (da * g_da).sum()).backward()
    ours = [t.to(device, torch.float32).requires_grad_() for t in (attributes, rast, db)]
    out2, da2 = rasterizer.interpolate(ours[0], ours[1], faces.to(device), rast_db=ours[2])
    assert da2 is not None
    ((out2 * g_out.to(out2)).sum() + (da2 * g_da.to(out2)).sum()).backward()
    close(out2, out)
    close(da2, da)
    close(ours[0].grad, inputs[0].grad)
    close(ours[1].grad[:, :2], inputs[1].grad[:, :2])
    close(ours[2].grad, inputs[2].grad)
    batch, _ = rasterizer.interpolate(ours[0], ours[1].reshape(2, 8, 9, 4), faces.to(device))
    assert torch.equal(batch.reshape(-1, 5), out2)  # an image batch and a flat list are the same thing


def test_partition_of_unity(backend):
    rasterizer, device = backend
    clip, faces = scene()
    clip, faces = clip.to(device), faces.to(device)
    raster = rasterizer.rasterize(clip, faces, H, W, derivatives=True)
    one, slope = rasterizer.interpolate(torch.ones(12, 1, device=device), raster.rast, faces, rast_db=raster.rast_db)
    assert slope is not None
    covered = (raster.rast[..., 3:] > 0).float()
    torch.testing.assert_close(one, covered)
    assert float(slope.abs().max()) == 0
    w, _ = rasterizer.interpolate(clip[0, :, 3:], raster.rast[:1], faces)
    z, _ = rasterizer.interpolate(clip[0, :, 2:3], raster.rast[:1], faces)
    torch.testing.assert_close(z, raster.rast[:1, ..., 2:3] * w, atol=1e-5, rtol=1e-4)
