"""Event streams: server-sent events from the job store, any number of listeners for one query per tick.

Each event has its number in the job as its id, so a client that comes back with Last-Event-ID, to this Router or to
another, gets what came after it: no gap, no repeat.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from serve_app.jobs import JobStore

log = logging.getLogger("ray.serve")
Row = dict[str, Any]
GONE: Row = {"seq": -1, "type": "gone", "data": {}}


class _Watch:
    """One job that somebody listens to: the number of its last event that was handed out, and to whom."""

    def __init__(self, head: int) -> None:
        self.head = head
        self.inboxes: set[asyncio.Queue[list[Row]]] = set()


class EventHub:
    """Asks the store for all watched jobs at once and hands new events to their listeners."""

    def __init__(self, store: JobStore, poll_s: Callable[[], float]) -> None:
        self.store = store
        self.poll_s = poll_s
        self.watches: dict[str, _Watch] = {}
        self.task: asyncio.Task[None] | None = None

    async def listen(self, job_id: str, after: int = 0, idle_s: float = 15.0) -> AsyncIterator[Row | None]:
        """The job's events from number after+1 on, ending with `done`; None whenever nothing came for idle_s."""
        inbox: asyncio.Queue[list[Row]] = asyncio.Queue()
        watch = self.watches.get(job_id)
        if watch is None:
            heads = await asyncio.to_thread(self.store.heads, [job_id])
            watch = self.watches.setdefault(job_id, _Watch(heads.get(job_id, 0)))
        watch.inboxes.add(inbox)
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._poll_for_ever())
        try:
            last = after
            batch = await self._replay(job_id, last)
            while True:
                for row in batch:
                    if row is GONE:
                        return
                    if row["seq"] > last:
                        last = row["seq"]
                        yield row
                        if row["type"] == "done":
                            return
                try:
                    batch = await asyncio.wait_for(inbox.get(), idle_s)
                except TimeoutError:
                    batch = []
                    yield None
        finally:
            watch.inboxes.discard(inbox)
            if not watch.inboxes and self.watches.get(job_id) is watch:
                del self.watches[job_id]

    async def _replay(self, job_id: str, after: int) -> list[Row]:
        rows: list[Row] = []
        while True:
            page = await asyncio.to_thread(self.store.events, job_id, after)
            rows += page
            if len(page) < 500:
                return rows
            after = page[-1]["seq"]

    async def _poll_for_ever(self) -> None:
        while self.watches:
            await asyncio.sleep(self.poll_s())
            try:
                await self._tick()
            except Exception as error:  # the database is away for a moment; listeners wait
                log.warning(f"could not look for events: {type(error).__name__}: {error}")
                await asyncio.sleep(1.0)

    async def _tick(self) -> None:
        watched = list(self.watches)
        heads: dict[str, int] = {}
        for start in range(0, len(watched), 500):
            heads |= await asyncio.to_thread(self.store.heads, watched[start : start + 500])
        for job_id in watched:
            watch = self.watches.get(job_id)
            if watch is None:
                continue
            if job_id not in heads:
                self._hand_out(watch, [GONE])
            elif heads[job_id] > watch.head:
                rows = await self._replay(job_id, watch.head)
                if rows:
                    watch.head = rows[-1]["seq"]
                    self._hand_out(watch, rows)

    @staticmethod
    def _hand_out(watch: _Watch, rows: list[Row]) -> None:
        for inbox in watch.inboxes:
            inbox.put_nowait(rows)

    async def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task


def encode(row: Row | None) -> bytes:
    """One server-sent event, or a comment that keeps the connection open."""
    if row is None:
        return b": still here\n\n"
    return f"id: {row['seq']}\nevent: {row['type']}\ndata: {json.dumps(row['data'])}\n\n".encode()
