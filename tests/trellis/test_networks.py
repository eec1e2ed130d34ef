"""The networks against twins written from the description in another way, and the published state dicts' shapes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from viewmesh.trellis.decoders import SubdivideBlock3d
from viewmesh.trellis.layers import MultiHeadRMSNorm, TimestepEmbedder, position_embedding
from viewmesh.trellis.slat_flow import SLatFlowModel
from viewmesh.trellis.sparse import SparseTensor, Voxels
from viewmesh.trellis.structure import SparseStructureFlowModel, UpsampleBlock3d
from viewmesh.trellis.tiny import MODELS
from viewmesh.trellis.transformer import FlowBlock
from viewmesh.trellis.vggt import Rotation2d


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module.eval().requires_grad_(False)


def structure_flow() -> SparseStructureFlowModel:
    model = randomised(SparseStructureFlowModel(**MODELS["sparse_structure_flow_model"][2]))
    assert isinstance(model, SparseStructureFlowModel)
    return model


def slat_flow() -> SLatFlowModel:
    model = randomised(SLatFlowModel(**MODELS["slat_flow_model"][2]))
    assert isinstance(model, SLatFlowModel)
    return model


def voxels(n: int = 60, items: int = 2) -> Voxels:
    generator = torch.Generator().manual_seed(2)
    parts = []
    for b in range(items):
        key = torch.randperm(16**3, generator=generator)[: n + 10 * b]
        parts.append(torch.stack([torch.full_like(key, b), key // 256, key // 16 % 16, key % 16], 1))
    return Voxels.of(torch.cat(parts), 16)


def test_flow_block_equals_its_formula_token_by_token():
    C, H, T = 12, 3, 5
    block = randomised(FlowBlock(C, 7, H, 4, qk_rms_norm=True))
    assert isinstance(block, FlowBlock)
    x, cond, t_emb = (torch.randn(*s) for s in ((1, 6, C), (1, 1, 1, T, 7), (1, C)))
    ours = block(x, t_emb, None, block.cross_attn.kv(cond), None, torch.tensor([6]))[0]

    def heads(rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(len(rows), H, -1)

    def attention(q, k, v):
        out = torch.zeros_like(q)
        for h in range(H):
            out[:, h] = torch.softmax(q[:, h] @ k[:, h].T / (C // H) ** 0.5, -1) @ v[:, h]
        return out.reshape(len(q), C)

    def rms(rows, norm):
        return rows / rows.norm(dim=-1, keepdim=True) * norm.gamma * (C // H) ** 0.5

    s1, k1, g1, s2, k2, g2 = block.adaLN_modulation[1](F.silu(t_emb))[0].split(C)
    y = x[0]
    h = F.layer_norm(y, (C,), eps=1e-6) * (1 + k1) + s1
    q, k, v = (heads(part) for part in block.self_attn.to_qkv(h).split(C, -1))
    attended = attention(rms(q, block.self_attn.q_rms_norm), rms(k, block.self_attn.k_rms_norm), v)
    y = y + g1 * block.self_attn.to_out(attended)
    h = F.layer_norm(y, (C,), block.norm2.weight, block.norm2.bias, 1e-6)
    k, v = (heads(part) for part in block.cross_attn.to_kv(cond[0, 0, 0]).split(C, -1))
    y = y + block.cross_attn.to_out(attention(heads(block.cross_attn.to_q(h)), k, v))
    h = F.layer_norm(y, (C,), eps=1e-6) * (1 + k2) + s2
    y = y + g2 * block.mlp.mlp[2](F.gelu(block.mlp.mlp[0](h), approximate="tanh"))
    torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["structure", "latents"])
def test_the_constant_of_the_unconditioned_pass_equals_a_condition_of_zeros(kind):
    model = structure_flow() if kind == "structure" else slat_flow()
    cond = torch.randn(1, 2, 1, 9, 32)
    x = torch.randn(2, 8, 4, 4, 4) if kind == "structure" else SparseTensor(torch.randn(130, 8), voxels())
    t = torch.tensor([300.0])
    short = model(x, t, model.context(cond, null=True))
    long = model(x, t, model.context(cond, torch.zeros(1, 2, 1, 9, 32)))
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-4)
    assert (short[0] - short[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["structure", "latents"])
def test_a_batch_equals_its_items_alone(kind):
    model = structure_flow() if kind == "structure" else slat_flow()
    cond, t = torch.randn(1, 2, 3, 9, 32), torch.tensor([300.0, 700.0])
    both = voxels()
    feats = torch.randn(len(both), 8)
    dense = torch.randn(2, 8, 4, 4, 4)
    whole = model(dense if kind == "structure" else SparseTensor(feats, both), t, model.context(cond))[0]
    for b in range(2):
        context = model.context(cond[:, b : b + 1])
        if kind == "structure":
            torch.testing.assert_close(
                whole[b], model(dense[b : b + 1], t[b : b + 1], context)[0, 0], rtol=1e-4, atol=1e-4
            )
        else:
            mine = both.item == b
            coords = torch.cat([torch.zeros_like(both.coords[mine][:, :1]), both.coords[mine][:, 1:]], 1)
            alone = model(SparseTensor(feats[mine], Voxels.of(coords, 16)), t[b : b + 1], context)[0]
            torch.testing.assert_close(whole[mine], alone, rtol=1e-4, atol=1e-4)


def test_voxel_order_does_not_matter_to_the_latent_flow():
    model, some = slat_flow(), voxels(items=1)
    feats, t = torch.randn(len(some), 8), torch.tensor([500.0])
    context = model.context(torch.randn(1, 1, 1, 9, 32))
    turn = torch.randperm(len(some))
    straight = model(SparseTensor(feats, some), t, context)[0]
    shuffled = model(SparseTensor(feats[turn], Voxels.of(some.coords[turn], 16)), t, context)[0]
    torch.testing.assert_close(shuffled, straight[turn], rtol=1e-4, atol=1e-4)


def test_subdivision_equals_copying_and_dense_convolution():
    block = randomised(SubdivideBlock3d(64, 32), 3)
    assert isinstance(block, SubdivideBlock3d)
    some = voxels(40, items=1)
    x = torch.randn(len(some), 64)
    ours = block(x, some)
    fine = Voxels.of(some.subdivided.coords, 32)

    def conv(rows: torch.Tensor, layer) -> torch.Tensor:
        dense = rows.new_zeros(1, rows.shape[1], 32, 32, 32)
        _, i, j, k = fine.coords.long().unbind(-1)
        dense[0, :, i, j, k] = rows.T
        return F.conv3d(dense, layer.conv.weight.permute(0, 4, 1, 2, 3), layer.conv.bias, padding=1)[0, :, i, j, k].T

    def norm(rows: torch.Tensor, layer) -> torch.Tensor:
        return F.silu(F.group_norm(rows.T[None], 32, layer.weight, layer.bias, 1e-5)[0].T)

    copied = x.repeat_interleave(8, 0)
    h = conv(norm(copied, block.act_layers[0]), block.out_layers[0])
    h = conv(norm(h, block.out_layers[1]), block.out_layers[3])
    weight = block.skip_connection.conv.weight
    reread = weight.flatten().reshape(64, 32)  # the published reading: the same memory, input channels first
    torch.testing.assert_close(ours, h + copied @ reread + block.skip_connection.conv.bias, rtol=1e-4, atol=1e-4)


def test_pixel_shuffle_places_each_channel_group_at_its_corner():
    block = UpsampleBlock3d(1, 1)
    with torch.no_grad():
        block.conv.weight.zero_()
        block.conv.bias.copy_(torch.arange(8.0))
        out = block(torch.zeros(1, 1, 2, 2, 2))[0, 0]
    expected = torch.arange(8.0).reshape(2, 2, 2)
    assert torch.equal(out[:2, :2, :2], expected)
    assert torch.equal(out[2:, 2:, 2:], expected)


def test_rms_norm_gives_each_head_its_gain():
    norm = MultiHeadRMSNorm(8, 3)
    with torch.no_grad():
        norm.gamma.fill_(2.0)
    torch.testing.assert_close(norm(torch.randn(5, 3, 8)).square().mean(-1), torch.full((5, 3), 4.0))


def test_embeddings_are_sines_and_cosines_in_the_published_order():
    embedded = position_embedding(torch.tensor([[3, 0, 5]]), 32)[0]  # 5 frequencies each, 2 zeros
    frequency = 10000.0 ** (-torch.arange(5) / 5)
    torch.testing.assert_close(embedded[:5], (3 * frequency).sin())
    torch.testing.assert_close(embedded[5:10], (3 * frequency).cos())
    torch.testing.assert_close(embedded[10:20], torch.tensor([0.0] * 5 + [1.0] * 5))
    assert (embedded[30:] == 0).all()
    embedder = TimestepEmbedder(256)
    embedder.mlp = nn.Sequential(nn.Identity())
    wave = embedder(torch.tensor([250.0]))[0]
    angle = 250 * torch.exp(-torch.arange(128) * torch.log(torch.tensor(1e4)) / 128)
    torch.testing.assert_close(wave, torch.cat([angle.cos(), angle.sin()]), rtol=1e-3, atol=1e-4)


def test_rotation_keeps_lengths_and_makes_products_depend_on_offsets_alone():
    rotate = Rotation2d.of_grid(4, 1, 16, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 16)
    rows_q, rows_k = rotate(q.expand(1, 17, 1, 16)), rotate(k.expand(1, 17, 1, 16))
    torch.testing.assert_close(rows_q.norm(dim=-1), q.norm(dim=-1).expand(1, 17, 1))
    scores = torch.einsum("qd,kd->qk", rows_q[0, :, 0], rows_k[0, :, 0])[1:, 1:].reshape(4, 4, 4, 4)
    torch.testing.assert_close(scores[:3, :3, :3, :3], scores[1:, 1:, 1:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(q.expand(1, 17, 1, 16))[0, 0], q[0, 0])  # special tokens are not turned
