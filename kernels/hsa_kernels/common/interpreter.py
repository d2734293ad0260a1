"""Triton's interpreter, which runs the kernels where there is no GPU."""

import numpy as np
import triton


def check_interpreter() -> None:
    """Raise ImportError if the interpreter is to run and fails in every loop of a kernel: that of
    triton 3.6 with numpy from 2.4 on.
    """
    versions = [module.__version__.split(".")[:2] for module in (triton, np)]
    triton_version, numpy_version = (tuple(map(int, version)) for version in versions)
    broken = triton_version < (3, 7) and numpy_version >= (2, 4)
    if triton.knobs.runtime.interpret and broken:
        raise ImportError(
            f"TRITON_INTERPRET: got triton {triton.__version__} with numpy {np.__version__}, "
            "accepted is triton from 3.7 on, or numpy below 2.4"
        )
