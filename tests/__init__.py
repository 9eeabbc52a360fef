"""Two files of tests run at a time, most of them with ranks: a process computes with one thread, or they wait for each other.

A CPU that has more instructions than the one on which the vectors in tests/golden were made does without them: they add products of
bfloat16 up in another order.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
