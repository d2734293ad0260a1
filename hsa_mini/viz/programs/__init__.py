"""Which program of a Triton kernel loads and stores which bytes."""
