"""A flow block is compiled while others use it: they run it uncompiled, and none waits for the compiler."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from viewmesh.trellis import warm
from viewmesh.trellis.warm import CompiledFor


@pytest.fixture
def compiler(monkeypatch):
    """A compiled block that behaves as torch's does: a call beside a compilation in another thread fails."""

    class Compiler:
        def __init__(self) -> None:
            self.compiling, self.go_on, self.calls = threading.Event(), threading.Event(), 0

        def __call__(self, block, *given):
            if block == "to be compiled":
                self.compiling.set()
                assert self.go_on.wait(10)
                self.compiling.clear()
            if self.compiling.is_set():
                raise RuntimeError("Detected that you are using FX to symbolically trace a dynamo-optimized function.")
            self.calls += 1
            return "compiled"

    compiler = Compiler()
    monkeypatch.setattr(warm, "compiled_block", lambda: compiler)
    return compiler


def test_what_is_compiled_is_not_called_beside_a_compilation(compiler):
    run, kv = CompiledFor(frozenset({(False, False)})), torch.zeros(1, 1)

    def block(*given):
        return "uncompiled"

    def call(given):
        return run(given, torch.zeros(1), torch.zeros(1), None, kv, None, torch.ones(1))  # pyright: ignore[reportArgumentType]

    assert call(block) == "compiled"
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(call, "to be compiled")
        assert compiler.compiling.wait(10)
        assert {call(block) for _ in range(5)} == {"uncompiled"}
        compiler.go_on.set()
        assert other.result() == "compiled"
    assert call(block) == "compiled"
    assert compiler.calls == 3


def test_a_kind_that_is_not_ready_runs_uncompiled(compiler):
    run = CompiledFor(frozenset({(False, False)}))
    given = (torch.zeros(1), torch.zeros(1), None, torch.zeros(1, 2), None, torch.ones(2))
    assert run(lambda *_: "uncompiled", *given) == "uncompiled"  # pyright: ignore[reportArgumentType]
    assert compiler.calls == 0


def test_compiled_code_that_fails_is_not_run_again_and_fails_no_job(monkeypatch, caplog):
    calls = []

    def broken(*given):
        calls.append(given)
        raise NameError("name '__compiled_fn_3' is not defined")

    monkeypatch.setattr(warm, "compiled_block", lambda: broken)
    run = CompiledFor(frozenset({(False, False)}))
    given = (torch.zeros(1), torch.zeros(1), None, torch.zeros(1, 1), None, torch.ones(1))
    with caplog.at_level("WARNING"):
        assert [run(lambda *_: "uncompiled", *given) for _ in range(3)] == ["uncompiled"] * 3  # pyright: ignore[reportArgumentType]
    assert len(calls) == 1
    assert "__compiled_fn_3" in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal memory access")]
)
def test_what_the_device_does_is_not_blamed_on_the_compiler(monkeypatch, error):
    def failing(*given):
        raise error

    monkeypatch.setattr(warm, "compiled_block", lambda: failing)
    run = CompiledFor(frozenset({(False, False)}))
    given = (torch.zeros(1), torch.zeros(1), None, torch.zeros(1, 1), None, torch.ones(1))
    with pytest.raises(type(error), match="CUDA"):
        run(lambda *_: "uncompiled", *given)  # pyright: ignore[reportArgumentType]
    assert run.ready
