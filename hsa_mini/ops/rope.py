"""Rotary positions; they live with the other operations in `hsa_mini.ops.rope`."""

from hsa_mini.ops.rope import apply_rope, rope_table

__all__ = ["apply_rope", "rope_table"]
