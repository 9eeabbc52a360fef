"""Two files of tests run at a time, most of them with ranks: a process computes with one thread, or they wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
