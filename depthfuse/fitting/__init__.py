"""Merged blocks fitted to what the original ones give, on a few hundred images without labels."""
