"""hsa-mini: Hierarchical Sparse Attention (Hu et al., arXiv 2511.23319) to learn, see, measure and reuse."""

import importlib

# Where the public names live. Each is imported when it is first used: `import hsa_kernels` needs the checks of this package,
# and must not load a model for them.
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
