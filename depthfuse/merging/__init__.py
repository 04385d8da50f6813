"""Blocks that can be merged, the supernet that holds them, and the exact merge."""
