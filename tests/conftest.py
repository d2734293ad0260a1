"""Settings of every test: one thread, and property tests that draw the same examples everywhere, without a database.

Without a GPU the kernels run in Triton's interpreter, which has to be said before any kernel is imported.
"""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(
    1
)  # the tensors are tiny: threads cost more than they bring, and far more on a busy machine

settings.register_profile(
    "hsa",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("hsa")
