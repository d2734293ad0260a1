"""Settings of every test: one thread, and property tests that draw the same examples everywhere, without a database."""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the tensors are tiny: threads cost more than they bring, and far more on a busy machine

settings.register_profile(
    "hsa", deadline=None, derandomize=True, database=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hsa")
