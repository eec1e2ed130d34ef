"""Makes what all tests share importable from this folder (synthetic_views), and their arithmetic single-threaded.

On tensors as small as the tests' two threads wait for each other more than they add: one is up to six times as fast
on a busy machine. What threads change is tested where it is the point.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in child processes
sys.path.insert(0, str(Path(__file__).parent))
