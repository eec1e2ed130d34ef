"""Sparse blocks and the streamed file: every bit comes back, in few bytes where there is little."""

import hashlib

import pytest
import safetensors
import torch

from viewmesh.nvdiffrec.sparse import BLOCK, SMALLEST, packed, unpacked
from viewmesh.nvdiffrec.stream import write_safetensors


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def mostly_zero(*shape: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=random)
    return torch.where(torch.rand(shape, generator=random) < 0.01, values, 0.0)


def samples() -> dict[str, torch.Tensor]:
    odd = mostly_zero(SMALLEST + 3)
    odd[-1], odd[5], odd[6] = 7.0, -0.0, float("nan")
    return {
        "volume": mostly_zero(1, 5, 16, 16, 16),
        "odd": odd,
        "turned": mostly_zero(300, 200).T,
        "zero": torch.zeros(SMALLEST),
        "dense": torch.randn(SMALLEST),
        "small": torch.zeros(3, 2),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
        "faces": torch.zeros(SMALLEST, 3, dtype=torch.int64),
        "band": torch.arange(11) % 3 == 0,
        "double": torch.ones(5, dtype=torch.float64),
    }


def test_what_is_packed_comes_back_bit_for_bit_and_in_its_order():
    given = samples()
    made, contents = packed(given)
    back = unpacked(made, contents)
    assert list(back) == list(given)
    assert all(bits(back[name]) == bits(given[name]) for name in given)
    assert {name for name, shape in contents.items() if shape} == {"volume", "odd", "turned", "zero"}


def test_few_bytes_where_there_is_little():
    made, _ = packed({"zero": torch.zeros(SMALLEST), "volume": mostly_zero(1, 5, 16, 16, 16)})
    assert made["zero.blocks"].shape == (0, BLOCK)
    assert sum(t.nbytes for t in made.values()) < 0.15 * samples()["volume"].nbytes


def test_a_missing_tensor_is_named():
    made, contents = packed(samples())
    del made["odd.at"]
    with pytest.raises(KeyError, match=r"odd\.at"):
        unpacked(made, contents)


def test_a_streamed_file_is_one_that_safetensors_reads(tmp_path):
    given, _ = packed(samples())
    sha256 = write_safetensors(tmp_path / "x", given, {"note": "ä"})
    assert sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    with safetensors.safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"note": "ä"}
        assert set(file.keys()) == given.keys()
        assert all(bits(file.get_tensor(name)) == bits(given[name]) for name in given)


def test_a_full_disk_is_an_error(monkeypatch, tmp_path):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("viewmesh.nvdiffrec.stream.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_safetensors(tmp_path / "x", samples(), {})
