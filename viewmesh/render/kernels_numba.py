"""How the CPU back-end's loops are compiled and spread over threads. The only importer of numba here.

The loops are in `loops_raster`, `loops_texture` and `loops_antialias`.

Every kernel `k(first, last, step, ...)` does the tasks first, first + step, ... < last and writes nothing that another
task writes, so the result does not depend on the number of threads. `launch` spreads the tasks over threads of our own:
the kernels release the GIL, compile several times faster than numba's parallel loops, may be called from several
threads at once, and do not spin against torch's thread pool.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import torch

jit = numba.njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")
inline = numba.njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", inline="always")


@cache
def _pool(process: int) -> ThreadPoolExecutor:  # one per process: threads do not survive a fork
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="viewmesh-render")


def launch(kernel, tasks: int, *arguments) -> None:
    """Runs the tasks of a kernel on as many threads as torch may use."""
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1:
        kernel(0, tasks, 1, *arguments)
        return
    pool = _pool(os.getpid())
    others = [pool.submit(kernel, t, tasks, threads, *arguments) for t in range(1, threads)]
    kernel(0, tasks, threads, *arguments)
    for other in others:
        other.result()
