"""What engines queue on a GPU, and how their threads wait for it."""

import subprocess
import sys
import threading

import pytest
import torch

from deployments.adapters.device import Side, wait_asleep

ASLEEP = """
import ctypes, torch
from deployments.adapters.device import wait_asleep
wait_asleep(torch.device("cuda"))
torch.zeros(1, device="cuda")
flags, active = ctypes.c_uint(), ctypes.c_int()
assert ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0
print(flags.value & 7, active.value)
"""


def test_on_a_cpu_there_is_neither_a_queue_nor_a_way_to_wait():
    wait_asleep(torch.device("cpu"))
    side = Side(torch.device("cpu"))
    with side():
        value = torch.ones(3).sum()
    assert side.stream is None
    assert float(value) == 3


@pytest.mark.gpu
def test_threads_sleep_while_they_wait_for_the_gpu():
    done = subprocess.run([sys.executable, "-c", ASLEEP], check=False, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["4", "1"], done.stderr


@pytest.mark.gpu
def test_what_a_side_queue_computed_is_there_for_every_queue_at_its_end():
    device = torch.device("cuda")
    side, wrong = Side(device, urgent=True), []
    work = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()

    def compute(k: int) -> None:
        for _ in range(20):
            with side():
                assert torch.cuda.current_stream() == side.stream
                value = (work @ work).mul(0).add(k)  # long enough not to be there at once
            if float(value.sum()) != k * value.numel():  # read in this thread's own queue
                wrong.append(k)

    threads = [threading.Thread(target=compute, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_a_side_queue_does_not_wait_for_what_others_have_queued():
    device = torch.device("cuda")
    side, work = Side(device, urgent=True), torch.randn(8192, 8192, device=device)
    with side():
        torch.ones(10, device=device).sum()  # a kernel's first launch loads it, which waits for all queues
    torch.cuda.synchronize()
    for _ in range(60):
        work @ work
    queued = torch.cuda.Event()
    queued.record()
    with side():
        torch.ones(10, device=device).sum()
    assert not queued.query()  # the others' are still at it
    torch.cuda.synchronize()
