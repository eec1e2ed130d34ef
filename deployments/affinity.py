"""Which replica gets a job's next slice: the one that has the job warm, else the one that has waited longest for work.

Every replica is a candidate: with a few only (Ray's consistent hashing tries three by default) jobs wait for each other
while other replicas are idle, and jobs that share a first candidate push each other out between their slices. The
memory is the caller's, one Conductor's; after its restart the ring of the base class gives the order.
"""

import itertools
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter


class WarmFirst(ConsistentHashRouter):
    """For one caller with `session_id` = job id. Ranks all replicas; the first that has room gets the call."""

    def initialize_state(self, **kwargs: Any) -> None:
        super().initialize_state(num_fallback_replicas=1_000_000)
        self._warm: dict[Any, tuple[int, str]] = {}  # replica → (turn of its last call, session of that call)
        self._turns = itertools.count(1)

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or not pending_request.metadata.session_id:
            return ranks
        return sorted(ranks, key=lambda rank: self._order(rank[0].replica_id, pending_request.metadata.session_id))

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        super().on_request_routed(pending_request, replica_id, result)
        session = pending_request.metadata.session_id
        if session:
            self._warm = {r: last for r, last in self._warm.items() if last[1] != session and r in self._replicas}
            self._warm[replica_id] = (next(self._turns), session)

    def _order(self, replica_id: Any, session: str) -> tuple[bool, int]:
        turn, last = self._warm.get(replica_id, (0, ""))
        return last != session, turn
