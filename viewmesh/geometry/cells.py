"""The nearest of very many points, on the device that they are on: a grid of cells, and coarser ones for the far off.

What a k-d tree answers on a CPU; a GPU looks through every cell around all queries at once. Points on a surface, spread
about evenly, are what it is made for.
"""

import torch
from torch import Tensor

MOST_CELLS = 2**24  # of one grid
PAIRS = 2**21  # of a query and a place for a point near it, looked at together: some 100 MB


class NearestPoints:
    """Exact: where the k-th nearest found lies farther off than the cells that were searched reach, a grid of cells
    twice as wide is asked, and so on until one covers everything."""

    def __init__(self, points: Tensor) -> None:
        """points: (N, 3), N > 0."""
        self.points = points
        self.low, high = points.amin(0), points.amax(0)
        self.extent = (high - self.low).double().tolist()
        self.grids: dict[int, _Grid] = {}

    def query(self, queries: Tensor, k: int) -> Tensor:
        """Indices (Q, min(k, N)) of the points nearest to each of queries (Q, 3), from the nearest on."""
        k = min(k, len(self.points))
        found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        open_, level = torch.arange(len(queries), device=queries.device), 0
        while len(open_):
            near, sure = self._grid(level).query(queries[open_], k)
            found[open_[sure]] = near[sure]
            open_, level = open_[~sure], level + 1
        return found

    def _grid(self, level: int) -> "_Grid":
        if level not in self.grids:
            # a surface of N points in a box has about N of (N / 6)^1.5 cells occupied
            side = max(max(self.extent) / max((len(self.points) / 6) ** 0.5, 1), 1e-12) * 2**level
            while True:
                counts = [int(extent / side) + 1 for extent in self.extent]
                if counts[0] * counts[1] * counts[2] <= MOST_CELLS:
                    break
                side *= 1.25
            self.grids[level] = _Grid(self.points, self.low, side, counts)
        return self.grids[level]


class _Grid:
    def __init__(self, points: Tensor, low: Tensor, side: float, counts: list[int]) -> None:
        self.points, self.low, self.side = points, low, side
        self.counts = torch.tensor(counts, device=points.device)
        key = self._key(self._cell(points))
        self.order = key.argsort()
        size = counts[0] * counts[1] * counts[2]
        self.start = torch.zeros(size + 1, dtype=torch.int64, device=points.device)
        self.start[1:] = torch.bincount(key, minlength=size).cumsum(0)
        self.covers_all = max(counts) <= 2

    def _cell(self, points: Tensor) -> Tensor:
        cell = torch.floor((points - self.low) / self.side).long()
        return torch.minimum(cell.clamp_(min=0), self.counts - 1)

    def _key(self, cell: Tensor) -> Tensor:
        x, y, z = cell.unbind(-1)
        return (x * self.counts[1] + y) * self.counts[2] + z

    def query(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Indices (Q, k), 0 where fewer were found; and for which queries (Q,) they are the nearest for sure."""
        first, length = self._runs(queries)
        total, order = length.sum(1).sort(descending=True)  # rows of a table are as wide as its first one
        near = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        sure = torch.empty(len(queries), dtype=torch.bool, device=queries.device)
        begin = 0
        while begin < len(queries):
            wide = max(int(total[begin]), k)
            rows = order[begin : begin + max(PAIRS // wide, 1)]
            near[rows], sure[rows] = self._nearest(queries[rows], first[rows], length[rows], k, wide)
            begin += len(rows)
        return near, sure

    def _runs(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The points in the 27 cells around each query as nine runs of `order`: where each begins, how long it is."""
        cell = self._cell(queries)
        around = torch.arange(-1, 2, device=queries.device)
        x, y = cell[:, :1] + around.repeat_interleave(3), cell[:, 1:2] + around.repeat(3)  # (Q, 9)
        z = cell[:, 2:]
        inside = (x >= 0) & (x < self.counts[0]) & (y >= 0) & (y < self.counts[1])
        row = (x * self.counts[1] + y) * self.counts[2] * inside
        first = self.start[row + (z - 1).clamp(min=0)]
        last = self.start[row + torch.minimum(z + 1, self.counts[2] - 1) + 1]
        return first, (last - first) * inside

    def _nearest(self, queries: Tensor, first: Tensor, length: Tensor, k: int, wide: int) -> tuple[Tensor, Tensor]:
        """`query` of a few queries, each with at most `wide` points around it, in a table of that many columns."""
        total = length.sum(1)
        run = torch.arange(length.numel(), device=queries.device).repeat_interleave(length.flatten())
        before = length.flatten().cumsum(0) - length.flatten()  # pairs of earlier runs
        pair = torch.arange(len(run), device=queries.device)
        point = self.order[first.flatten()[run] + pair - before[run]]
        query = run // length.shape[1]
        slot = pair - (total.cumsum(0) - total)[query]
        distance = queries.new_full((len(queries), wide), torch.inf)
        candidate = torch.zeros(len(queries), wide, dtype=torch.int64, device=queries.device)
        distance[query, slot] = (self.points[point] - queries[query]).square().sum(-1)
        candidate[query, slot] = point
        nearest, at = distance.topk(k, dim=1, largest=False)
        within = (queries - self.low) / self.side - self._cell(queries)
        reach = (torch.minimum(within, 1 - within).amin(1) + 1) * self.side  # of the cells that were searched
        return candidate.gather(1, at), (nearest[:, -1].sqrt() <= reach) | self.covers_all
