"""hsa-mini: Hierarchical Sparse Attention (Hu et al., arXiv 2511.23319), taught and measured."""

import importlib

TYPE_CHECKING = False  # that of `typing`, which would take as long to import as all else here
if TYPE_CHECKING:  # for editors and type checkers; at run time `__getattr__` below imports a name
    from hsa_mini.config import PRESETS, HSAConfig
    from hsa_mini.hsa_model import HSAModel
    from hsa_mini.memory.chunk_memory import ChunkMemory
    from hsa_mini.model.core import Output

# The module of each public name. A name is imported when it is first used, because
# `import hsa_kernels` needs the checks of this package and must not load a model with them.
_HOMES = {
    "PRESETS": "hsa_mini.config",
    "HSAConfig": "hsa_mini.config",
    "ChunkMemory": "hsa_mini.memory.chunk_memory",
    "HSAModel": "hsa_mini.hsa_model",
    "Output": "hsa_mini.model.core",
}
__all__ = ["PRESETS", "ChunkMemory", "HSAConfig", "HSAModel", "Output"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
