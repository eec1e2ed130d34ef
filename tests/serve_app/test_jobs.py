"""The job store's laws, on a random walk of everything that can happen to jobs."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from stores import new_database

from serve_app import quotas
from serve_app.jobs import DifferentRequest, InputGone, JobStore, NewJob, id_of_key, new_id
from serve_app.quotas import DAY_S, Quota, TooManyJobs, TooMuchSent
from serve_app.schemas import TERMINAL

REF = {"key": "inputs/aa/aaaa", "sha256": "a" * 64, "size": 10}


def new_job(job_id: str = "", owner: str = "ann", request_hash: str = "h", **more) -> NewJob:
    return NewJob(
        job_id or new_id(), owner, "reconstruction", "nvdiffrec", {}, {"views/0.png": REF}, request_hash, **more
    )


@pytest.fixture(params=["local", "cloud"])
def database(request, tmp_path):
    if request.param == "local":
        return f"sqlite:///{tmp_path}/jobs.sqlite"
    return new_database(request.getfixturevalue("postgres_server"))


@pytest.fixture
def store(database):
    made = JobStore(database)
    made.create()
    made.create()
    yield made
    made.close()


def accept(store: JobStore, job: NewJob, **more):
    return store.accept(job, lambda *a: None, **more)


def sent(store: JobStore, owner: str, in_s: float = 0.0) -> int:
    with store.engine.connect() as connection:
        return quotas.sent(connection, owner, time.time() + in_s)


def test_ids_sort_by_time_and_keys_of_owners_differ():
    ids = []
    for _ in range(3):
        ids.append(new_id())
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert id_of_key("ann", "k") == id_of_key("ann", "k") != id_of_key("bob", "k")


def test_a_job_whose_workflow_cannot_be_enqueued_is_not_accepted(store):
    def broken(*args):
        raise OSError("no")

    job = new_job()
    with pytest.raises(OSError, match="no"):
        store.accept(job, broken)
    assert store.get(job.id) is None


def test_the_same_id_needs_the_same_request(store):
    job = new_job()
    assert accept(store, job)[1]
    assert not accept(store, job)[1]
    with pytest.raises(DifferentRequest):
        accept(store, new_job(job.id, request_hash="other"))
    with pytest.raises(DifferentRequest):
        accept(store, new_job(job.id, owner="bob"))


def test_quotas_count_queued_and_running(store):
    first, one = new_job(), Quota(active_jobs=1)
    accept(store, first, quota=one)
    with pytest.raises(TooManyJobs):
        accept(store, new_job(), quota=one)
    accept(store, new_job(owner="bob"), quota=one)
    store.cancel(first.id, None)
    accept(store, new_job(), quota=one)


def test_jobs_accepted_at_once_do_not_pass_a_day_s_bytes_together(store):
    """Each upload was let in when there was room for it."""
    quota, refused = Quota(upload_bytes_per_day=3 * REF["size"]), []

    def one(_: int) -> None:
        try:
            accept(store, new_job(), quota=quota)
        except TooMuchSent as error:
            refused.append(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    assert len(refused) == 5
    assert sent(store, "ann") == 3 * REF["size"]
    assert store.left_today("ann", new_id(), quota) == 0
    export = NewJob(new_id(), "ann", "export", "nvdiffrec", {}, {}, "h")
    assert accept(store, export, quota=quota)[1]  # sends nothing


def test_an_input_that_is_gone_is_noticed_before_the_job_is_accepted(store):
    with pytest.raises(InputGone):
        accept(store, new_job(), missing=lambda keys: keys)


def test_inputs_live_as_long_as_a_job_that_uses_them(store):
    a, b, removed = new_job(), new_job(), []
    accept(store, a)
    accept(store, b)
    assert store.delete(a.id, "bob", removed.extend) is None
    assert store.delete(a.id, "ann", removed.extend) == [a.id]
    assert removed == []
    store.delete(b.id, None, removed.extend)
    assert removed == [REF["key"]]


def test_exports_go_with_their_reconstruction(store):
    parent = new_job()
    accept(store, parent)
    child = NewJob(new_id(), "ann", "export", "nvdiffrec", {}, {}, "h", parent=parent.id)
    accept(store, child)
    assert set(store.delete(parent.id, "ann", lambda keys: None)) == {parent.id, child.id}
    assert store.get(child.id) is None


def test_a_reconstruction_stays_as_long_as_its_exports(store):
    parent = new_job()
    child = NewJob(new_id(), "ann", "export", "nvdiffrec", {}, {}, "h", parent=parent.id)
    for job, expires in ((parent, 1.0), (child, 5.0)):
        accept(store, job)
        assert store.expired(2.0) == []  # nor while the export waits
        store.start(job.id)
        store.succeed(job.id, [], {}, expires)
    assert store.expired(2.0) == []
    assert set(store.expired(6.0)) == {parent.id, child.id}
    assert store.expired(6.0, after=max(parent.id, child.id)) == []


def test_progress_never_goes_back_and_repeats_are_silent(store):
    job = new_job()
    accept(store, job)
    data = {"stage": "optimise", "step": 1, "steps": 9}
    assert not store.progress(job.id, percent=5, data=data)  # not running yet
    store.start(job.id)
    assert store.progress(job.id, percent=5, data=data)
    assert not store.progress(job.id, percent=5, data=data)
    assert not store.progress(job.id, percent=4, data=data)
    assert store.preview(job.id, 3, REF)
    assert not store.preview(job.id, 3, REF)


def test_a_deleted_job_counts_as_uploaded_until_its_day_is_over(store):
    for _ in range(2):  # an idempotency key may be used again after a delete
        job = new_job("0" * 36)
        accept(store, job)
        store.delete(job.id, "ann", lambda keys: None)
    accept(store, new_job())
    accept(store, new_job(owner="bob"))
    assert (sent(store, "ann"), sent(store, "bob")) == (3 * REF["size"], REF["size"])
    assert sent(store, "ann", in_s=DAY_S) == 0


def test_counters_never_fall_when_jobs_are_deleted(store):
    job = new_job()
    accept(store, job)
    store.start(job.id)
    store.fail(job.id, {"code": "out_of_memory"}, None)
    before = store.figures()["tallies"]
    store.delete(job.id, None, lambda keys: None)
    assert store.figures()["tallies"] == before
    assert ("jobs", "reconstruction|nvdiffrec|failed|out_of_memory", 1.0) in before


def test_a_stage_that_is_recorded_again_counts_once_and_none_after_the_end(store):
    job = new_job()
    accept(store, job)
    store.start(job.id)
    store.stage_done(job.id, "optimise", 16.5)
    for seconds in (3.0, 2.0):
        store.stage_done(job.id, "export", seconds, result={"views": seconds})
    row = store.get(job.id)
    assert (row["timings"], row["result"]) == ({"optimise": 16.5, "export": 2.0}, {"views": 2.0})
    store.cancel(job.id, None)
    store.stage_done(job.id, "optimise", 8.0)
    assert store.get(job.id)["timings"] == row["timings"]


def test_what_jobs_add_to_the_sums(store):
    for seconds in (2.0, 0.5):
        job = new_job()
        accept(store, job)
        store.start(job.id)
        store.stage_done(job.id, "prepare", seconds)
        store.succeed(job.id, [{**REF, "name": name} for name in ("mesh.glb", "report.json")], {}, None)
        told = [(event["type"], event["data"].get("name")) for event in store.events(job.id)]
        assert told[2:4] == [("artifact", "mesh.glb"), ("artifact", "report.json")]
    sums = {(name, label): value for name, label, value in store.figures()["tallies"]}
    assert sums.pop(("job_seconds", "reconstruction|nvdiffrec")) > 0
    assert sums == {
        ("jobs", "reconstruction|nvdiffrec|succeeded|"): 2,
        ("stage_seconds", "prepare"): 2.5,
        ("stage_count", "prepare"): 2,
    }


class Jobs(RuleBasedStateMachine):
    """Whatever happens in whatever order: one end per job, events numbered without gap, states only forwards."""

    made = Bundle("made")

    def __init__(self, database: str):
        super().__init__()
        self.store = JobStore(database)
        self.store.create()
        self.states: dict[str, list[str]] = {}

    @rule(target=made)
    def submit(self):
        job = new_job()
        accept(self.store, job)
        self.states[job.id] = ["queued"]
        return job.id

    @rule(job=made)
    def start(self, job):
        row = self.store.start(job)
        assert (row is not None) == (self.now(job) in ("queued", "running"))

    @rule(job=made, percent=st.floats(0, 100))
    def progress(self, job, percent):
        self.store.progress(job, percent=percent, data={"stage": "optimise", "step": 1, "steps": 2})

    @rule(job=made, step=st.integers(0, 5))
    def preview(self, job, step):
        self.store.preview(job, step, REF)

    @rule(job=made)
    def succeed(self, job):
        self.store.succeed(job, [{"name": "mesh.glb", **REF}], {}, None)

    @rule(job=made)
    def fail(self, job):
        self.store.fail(job, {"code": "x"}, None)

    @rule(job=made)
    def cancel(self, job):
        self.store.cancel(job, None)

    def now(self, job):
        return self.states[job][-1]

    @invariant()
    def laws(self):
        for job, states in self.states.items():
            row = self.store.get(job)
            events = self.store.events(job)
            assert [e["seq"] for e in events] == list(range(1, row["seq"] + 1))
            told = [e["data"]["state"] for e in events if e["type"] == "state"]
            assert told[: len(states)] == states
            self.states[job] = told
            assert told[-1] == row["state"]
            ends = [e for e in events if e["type"] == "done"]
            assert len(ends) == (row["state"] in TERMINAL)
            if ends:
                assert events[-1] == ends[0]
            assert bool(self.store.artifact(job, "mesh.glb")) == (row["state"] == "succeeded")
            assert not self.store.artifact(job, "preview.png") or row["state"] == "running"

    def teardown(self):
        self.store.close()


@pytest.mark.parametrize("kind", ["local", "cloud"])
def test_a_random_walk_of_everything_that_happens_to_jobs(kind, request, tmp_path):
    server = request.getfixturevalue("postgres_server") if kind == "cloud" else None

    def fresh():
        return Jobs(new_database(server) if server else f"sqlite:///{tmp_path}/{new_id()}.sqlite")

    laws = settings(max_examples=15 if kind == "local" else 8, stateful_step_count=20, deadline=None)
    run_state_machine_as_test(fresh, settings=laws)
