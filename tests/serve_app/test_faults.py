"""What breaks while jobs run, and that nobody notices but the clock.

Each fault ends with the job succeeded, its artifacts matching their sha256 and the event stream without gap or repeat.
"""

import os
import signal
import time

import pytest

from serve_app.testing import deployment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def service(ray_service):
    return ray_service


@pytest.fixture
def client(service):
    with service.client() as made:
        yield made


def test_the_optimiser_dies_in_the_middle_of_a_slice(service, client, tmp_path):
    job_id = service.submit(client, tmp_path, optimise_s=10, steps=100, scratch=str(tmp_path))
    follower = service.follow(client, job_id)
    service.await_step(client, job_id, 25)
    killed = time.monotonic()
    service.kill("Nvdiffrec")
    service.await_step(client, job_id, client.get(job_id).step + 1)
    resumed = time.monotonic() - killed
    service.assert_whole(client, job_id, follower.all())
    assert client.get(job_id).resumes >= 1
    made = [int(line.split()[1]) for line in (tmp_path / "step").read_text().splitlines()]
    assert len(made) - len(set(made)) <= 20  # at most a slice of a second, and the half step, is done twice
    assert resumed <= 20


def test_the_conductor_dies(service, client, tmp_path):
    job_id = service.submit(client, tmp_path, optimise_s=12, steps=120)
    queued = service.submit(client, tmp_path, optimise_s=0.2)
    follower = service.follow(client, job_id)
    service.await_step(client, job_id, 20)
    killed = time.monotonic()
    service.kill("Conductor")
    service.await_step(client, job_id, client.get(job_id).step + 1)
    resumed = time.monotonic() - killed
    print(f"resumed {resumed:.1f} s after the Conductor was killed")  # noqa: T201
    assert resumed <= 20
    service.assert_whole(client, job_id, follower.all())
    service.assert_whole(client, queued)


def test_the_router_dies_under_an_event_stream(service, client, tmp_path):
    job_id = service.submit(client, tmp_path, optimise_s=10, steps=100)
    follower = service.follow(client, job_id)
    service.await_step(client, job_id, 20)
    service.kill("Router")
    service.assert_whole(client, job_id, follower.all())


def test_a_lost_device_is_replaced(service, client, tmp_path):
    job_id = service.submit(client, tmp_path, optimise_s=4, fail="device_lost", times=1, scratch=str(tmp_path))
    before = service.pids("Nvdiffrec")
    service.assert_whole(client, job_id)
    assert service.pids("Nvdiffrec") != before


def test_a_job_that_loses_every_device_fails_and_the_next_one_does_not(service, client, tmp_path):
    job_id = service.submit(client, tmp_path, optimise_s=0.5, fail="device_lost")
    assert client.wait(job_id).error.code == "device_lost"
    service.assert_whole(client, service.submit(client, tmp_path))


def test_a_changed_user_config_restarts_nothing(service, client, tmp_path):
    job_id = service.submit(client, tmp_path, optimise_s=8, steps=80)
    follower = service.follow(client, job_id)
    service.await_step(client, job_id, 10)
    before = service.pids("Nvdiffrec")
    service.deploy(lambda c: deployment(c, "Nvdiffrec")["user_config"].update(slice_s=0.5))
    service.await_running()
    service.assert_whole(client, job_id, follower.all())
    assert service.pids("Nvdiffrec") == before
    assert client.get(job_id).resumes == 0


def test_changed_args_restart_everything_and_lose_nothing(service, client, tmp_path):
    job_id = service.submit(client, tmp_path, optimise_s=25, steps=250)
    waiting = service.submit(client, tmp_path, optimise_s=0.2)
    follower = service.follow(client, job_id)
    service.await_step(client, job_id, 10)
    before = service.pids("Nvdiffrec")
    service.deploy(lambda c: c["applications"][0]["args"].update(retention_s=3600))
    service.await_running()
    service.assert_whole(client, job_id, follower.all(150))
    service.assert_whole(client, waiting)
    assert service.pids("Nvdiffrec") != before


def test_a_downscale_takes_a_busy_replica_away(service, client, tmp_path):
    """Serve gives a replica that must go less time than its slice needs: at worst that slice is done again."""

    def replicas(count):
        def change(config):
            worker = deployment(config, "Nvdiffrec")
            worker["autoscaling_config"].update(min_replicas=count, max_replicas=count)
            worker["ray_actor_options"] = {"num_cpus": 0, "num_gpus": 0}
            worker["graceful_shutdown_timeout_s"] = 0.2
            deployment(config, "Conductor")["user_config"]["slots"] = {"nvdiffrec": 2}

        return change

    service.deploy(replicas(2))
    service.await_running()
    ids = [service.submit(client, tmp_path, {"seed": i}, optimise_s=14, steps=140) for i in range(2)]
    followers = [service.follow(client, job_id) for job_id in ids]
    for job_id in ids:
        service.await_step(client, job_id, 10)
    assert len(service.pids("Nvdiffrec")) == 2
    service.deploy(replicas(1))
    for job_id, follower in zip(ids, followers, strict=True):
        service.assert_whole(client, job_id, follower.all(150))
    assert len(service.pids("Nvdiffrec")) == 1


def test_bad_args_leave_the_running_version_in_place(service, client, tmp_path):
    service.deploy(lambda c: c["applications"][0]["args"].update(nonsense=1))
    until = time.monotonic() + 30
    while service.status()["status"] != "DEPLOY_FAILED" and time.monotonic() < until:
        time.sleep(0.3)
    service.assert_whole(client, service.submit(client, tmp_path))
    service.deploy(lambda c: c["applications"][0]["args"].pop("nonsense"))
    service.await_running()


def test_the_whole_service_stops_and_starts_with_jobs_queued_and_running(service, client, tmp_path):
    running = service.submit(client, tmp_path, optimise_s=15, steps=150)
    waiting = [service.submit(client, tmp_path, optimise_s=0.3) for _ in range(3)]
    service.await_step(client, running, 20)
    service.stop()
    service.start()
    for job_id in (running, *waiting):
        service.assert_whole(client, job_id)
    assert client.get(running).resumes >= 1  # from its checkpoint, not from the beginning


def test_the_machine_is_switched_off_and_on(service, client, tmp_path):
    job_id = service.submit(client, tmp_path, optimise_s=10, steps=100)
    service.await_step(client, job_id, 20)
    for pid, _ in service.processes():
        os.kill(pid, signal.SIGKILL)
    service.child.wait()
    service.start()
    service.assert_whole(client, job_id)
