"""Times, peaks, counts, and a cache of what was measured."""
