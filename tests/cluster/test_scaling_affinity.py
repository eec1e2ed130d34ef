"""Where a job's next slice goes: to its warm replica, else to the one that has waited longest; never nowhere."""

from types import SimpleNamespace

import pytest

from deployments.affinity import WarmFirst


@pytest.fixture
def router():
    """The router without its Serve: replicas that are names, and nobody listening."""
    made = WarmFirst.__new__(WarmFirst)
    ids = [Id(name) for name in "abcdefgh"]
    made._replicas = {replica_id: SimpleNamespace(replica_id=replica_id) for replica_id in ids}
    made.deployment_id = made._deployment_id = "Nvdiffrec"
    made.initialize_state()
    made._rebuild_ring(frozenset(ids))
    return made


class Id(str):
    __slots__ = ()

    @property
    def unique_id(self) -> str:
        return str(self)


def request(job: str):
    metadata = SimpleNamespace(session_id=job, internal_request_id="x")
    return SimpleNamespace(metadata=metadata, routing_context=SimpleNamespace(should_backoff=False))


async def ranked(router, job: str) -> list[str]:
    ranks = await router.choose_replicas(list(router._replicas.values()), request(job))
    assert all(len(rank) == 1 for rank in ranks)
    return [str(rank[0].replica_id) for rank in ranks]


async def send(router, job: str, busy: frozenset[str] = frozenset()) -> str:
    """One call, as Serve makes it: the first replica of the ranks that has room."""
    chosen = next(name for name in await ranked(router, job) if name not in busy)
    router.on_request_routed(request(job), Id(chosen), None)
    return chosen


async def test_every_replica_is_a_candidate(router):
    assert sorted(await ranked(router, "job")) == list("abcdefgh")


async def test_a_job_goes_back_to_where_it_is_warm(router):
    home = await send(router, "one")
    for other in ("two", "three", "four"):
        assert await send(router, other) != home
    assert await send(router, "one") == home
    moved = await send(router, "one", busy=frozenset({home}))
    assert moved != home
    assert await send(router, "one") == moved


async def test_as_many_jobs_as_replicas_never_meet(router):
    homes = {job: await send(router, job) for job in map(str, range(8))}
    assert sorted(homes.values()) == list("abcdefgh")
    for _ in range(3):
        for job in reversed(homes):  # in whatever order their slices end
            assert await send(router, job) == homes[job]


async def test_a_new_job_takes_the_replica_whose_job_is_over(router):
    homes = {job: await send(router, job) for job in map(str, range(8))}
    for job in homes:
        if job != "5":
            await send(router, job)
    assert await send(router, "new") == homes["5"]


async def test_a_replica_that_is_gone_is_forgotten(router):
    home = await send(router, "one")
    del router._replicas[Id(home)]
    assert await send(router, "one") != home
    assert set(router._warm) <= set(router._replicas)


async def test_calls_without_a_job_keep_the_order_of_the_ring(router):
    assert len(await ranked(router, "")) == 8
