"""Settings of every test: one thread, and property tests that draw the same examples everywhere.

Without a GPU the kernels run in Triton's interpreter. Triton reads the environment variable for it
when a kernel is defined, so it is set before any kernel is imported.
"""

import os
import signal

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell starts a command behind `&` with Ctrl-C ignored, and so would every process of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tensors are tiny, so threads cost more time than they save, above all on a busy machine.
torch.set_num_threads(1)

settings.register_profile(
    "hsa",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("hsa")
