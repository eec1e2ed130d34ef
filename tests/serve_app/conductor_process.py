"""One of several Conductors on one database: a process that can be stopped and let go on.

    python conductor_process.py '{"data": …}'       the application's arguments

Says `ready`, then `leads EPOCH` once it has the lease, and ends with 1 as soon as Serve would replace it.
"""

import asyncio
import functools
import json
import os
import sys
import threading
import time

from ray import serve

from serve_app import conductor, database
from serve_app.app import build_conductor
from serve_app.lease import Lease
from serve_app.settings import AppArgs

LEASE_S = 3.0
IDLE_IN_TRANSACTION_MS = 6_000


class Told(Lease):
    def acquire(self) -> bool:
        acquired = super().acquire()
        if acquired:
            say(f"leads {self.epoch}")
        return acquired


def say(text: str) -> None:
    """And when, by the clock that all processes of a machine share."""
    sys.stdout.write(f"{text}\t{time.monotonic()}\n")
    sys.stdout.flush()


async def run(args: dict) -> None:
    database.IDLE_IN_TRANSACTION_MS = IDLE_IN_TRANSACTION_MS
    conductor.Lease = functools.partial(Told, lease_s=LEASE_S, margin_s=1.0, renew_s=0.5)
    graph = build_conductor(AppArgs(**args))
    handle = await asyncio.to_thread(lambda: serve.run(graph, _local_testing_mode=True))
    await handle.ready.remote()
    say("ready")
    while True:
        try:
            await handle.check_health.remote()
        except RuntimeError as error:
            say(f"unhealthy: {error}")
            os._exit(1)
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    # Ends with the test that started it, also when that was killed.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    asyncio.run(run(json.loads(sys.argv[1])))
