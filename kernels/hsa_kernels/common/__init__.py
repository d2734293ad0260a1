"""What the kernels share: tiles, checks, selection of the K largest, and the inverted index."""
