"""hsa-mini: Hierarchical Sparse Attention (Hu et al., arXiv 2511.23319) to learn, see, measure and reuse."""

from .config import PRESETS, HSAConfig
from .memory import ChunkMemory
from .model import HSAModel, Output

__all__ = ["PRESETS", "ChunkMemory", "HSAConfig", "HSAModel", "Output"]
