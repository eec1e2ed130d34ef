"""Functions of tensors that are called again and again in few shapes, replayed as CUDA graphs.

A replay is one call. So a network of a thousand kernels keeps its device busy also from a host whose cores, and whose
interpreter, other threads want: launched one by one beside twelve requests that are being textured, the same kernels
took up to three times as long.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

Shapes = tuple[Hashable, ...]


@dataclass(frozen=True)
class Graph:
    """What is read and written lies where it was while it was recorded."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class Recorded:
    """`function` of CUDA tensors, which returns one; replayed for what it was recorded for, called for anything else.

    Several threads may call it, on streams of their own: replays wait for each other on the device. Keyword arguments
    are not tensors, and each value is a graph of its own. What the function itself reads (weights) must stay in place,
    and it must neither wait for the device nor copy to it.

    A method is held weakly, for its object may hold this one: in a cycle, weights would stay on the device until
    somebody collects garbage, which Serve's replicas do seldom.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = WeakMethod(function) if isinstance(function, MethodType) else lambda: function
        self.graphs: dict[Shapes, Graph] = {}
        self.replaying = threading.Lock()
        self.pool: Any = None  # of device memory, shared by the graphs: no two run at once
        self.last: torch.Event | None = None

    @property
    def function(self) -> Callable[..., Tensor]:
        function = self._function()
        assert function is not None, "its object is gone"
        return function

    def __call__(self, *inputs: Tensor, **chosen: Any) -> Tensor:
        found = self.graphs.get(_shapes(inputs, chosen))
        if found is None:
            return self.function(*inputs, **chosen)
        with self.replaying, torch.cuda.device(inputs[0].device):
            stream = torch.cuda.current_stream()
            if self.last is not None:
                stream.wait_event(self.last)
            for mine, given in zip(found.inputs, inputs, strict=True):
                mine.copy_(given)
            found.graph.replay()
            output = found.output.clone()
            self.last = stream.record_event()
            return output

    @torch.no_grad()
    def record(self, *inputs: Tensor, **chosen: Any) -> None:
        """For calls with inputs of the same shapes, and the same keywords. Other threads may use the device meanwhile,
        this object too."""
        key, device = _shapes(inputs, chosen), inputs[0].device
        if key in self.graphs:
            return
        with torch.cuda.device(device):
            held = tuple(given.clone() for given in inputs)
            # Plans, which cannot be made while it is recorded. In the caller's stream: what a stream has allocated
            # stays its own, and another one's would be gigabytes that nobody uses again.
            self.function(*held, **chosen)
            before, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(before)
            with torch.cuda.stream(side):
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(self.pool, capture_error_mode="thread_local")
                try:
                    output = self.function(*held, **chosen)
                finally:
                    graph.capture_end()
            before.wait_stream(side)
            # cuBLAS would give its scratch memory of this recording to whoever is handed the same stream later.
            torch._C._cuda_clearCublasWorkspaces()
        self.graphs[key] = Graph(graph, held, output)


def _shapes(inputs: tuple[Tensor, ...], chosen: dict[str, Any]) -> Shapes:
    return (*((tuple(given.shape), given.dtype) for given in inputs), *sorted(chosen.items()))
